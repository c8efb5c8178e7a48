"""Frozen weights of the input embedding and of the head in host memory, where the GPU reads them.

A GPU reaches locked host memory by its own address, only slower. So the parameters stay CUDA tensors with their names
and identity, and whatever reads them needs not know: lookups, recorded launches, merging, saving. A lookup reads each
row once, from where it is. A product would read the weights once for every block of rows, so the head works on a copy,
which is let go when nobody needs it any more: the backward of the layers comes after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftcore import bind
from ftcore.patching import UNDO
from ftcore_kernels.layers.decoder.pinned import Pinned

HOST = "ftcore_host"
"""Attribute of an embedding or a head whose weight is in host memory: its :class:`HostWeight`."""


class HostWeight:
    """One parameter's values in host memory."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.device = parameter.device
        self._pinned = Pinned(parameter.numel() * parameter.element_size(), self.device)
        self.host = self._pinned.bytes.view(parameter.dtype).view(parameter.shape)
        """On the CPU."""
        self.host.copy_(parameter.detach())
        self._held: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has memory of its own."""
        return HostWeight, (nn.Parameter(self.host.to(self.device, copy=True), requires_grad=False),)

    def address(self) -> torch.Tensor | None:
        """The same memory as a tensor of the GPU's; None where it cannot reach it."""
        if self.device.type != "cuda":
            return self.host
        if not self._pinned.locked:
            return None
        reached = torch.as_tensor(_Reached(self._pinned), device=self.device)
        if reached.data_ptr() != self.host.data_ptr():  # it was copied
            return None
        return reached.view(self.host.dtype).view(self.host.shape)

    def here(self) -> torch.Tensor:
        """A copy on the GPU, which belongs to whoever asks."""
        self._held = None
        return torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device).copy_(
            self.host, non_blocking=True
        )

    def held(self) -> torch.Tensor:
        """A copy on the GPU that stays, where there are no gradients: until somebody trains.

        Whoever writes text asks for it once for every token.
        """
        if torch.is_grad_enabled():
            return self.here()
        if self._held is None:
            self._held = self.here()
        return self._held


class _Reached:
    """Locked host memory as the CUDA array interface tells of it; the tensor made of this keeps it alive."""

    def __init__(self, pinned: Pinned) -> None:
        self._pinned = pinned
        memory = pinned.bytes
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 2,
        }


class HostWeights:
    """What a patched `...ForCausalLM` carries as `ftcore_host_weights`; `memory=offload` calls `leave`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def embedding(self) -> nn.Parameter | None:
        """The input embedding, where it is frozen and nothing else."""
        module = self._model.get_input_embeddings()
        return module.weight if isinstance(module, nn.Embedding) and self._alone(module) else None

    def head(self) -> nn.Parameter | None:
        """The head, where it is frozen and not the embedding again."""
        module = self._model.get_output_embeddings()
        plain = type(module) is nn.Linear and not _hooked(module)
        return module.weight if plain and self._alone(module) else None

    def leave(self, head: bool = True) -> int:
        """Move what may leave the GPU; without the head if it is asked to stay. Returns the bytes that left."""
        model, left = self._model, 0
        if self.embedding() is not None:
            left += _moved(model.get_input_embeddings())
        if head and self.head() is not None:
            module = model.get_output_embeddings()
            if gone := _moved(module):
                left += gone
                bind(module, _product)
        return left

    def _alone(self, module: nn.Module) -> bool:
        """Whether its weight is frozen, not here yet, and no other module's."""
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return not weight.requires_grad and not hasattr(module, HOST) and sum(1 for _ in self._owners(weight)) == 1

    def _owners(self, weight: nn.Parameter) -> Iterator[nn.Module]:
        for module in self._model.modules():
            if any(parameter is weight for parameter in module._parameters.values()):
                yield module


def weight_of(head: nn.Linear) -> torch.Tensor:
    """The head's weight for a while: a copy on the GPU where the weight itself is in host memory."""
    host: HostWeight | None = getattr(head, HOST, None)
    return head.weight if host is None else host.here()


def _moved(module: Any) -> int:
    """Leave a module's weight in host memory; returns its bytes, or 0 where the GPU would not reach it there."""
    weight = module.weight
    host = HostWeight(weight)
    reached = host.address()
    if reached is None:
        return 0
    weight.data = reached
    setattr(module, HOST, host)
    vars(module)[UNDO] = partial(_back, module)
    return int(weight.numel() * weight.element_size())


def _back(module: Any) -> None:
    host: HostWeight = getattr(module, HOST)
    module.weight.data = host.here()
    delattr(module, HOST)


def _product(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The head's own forward: `[..., H] -> [..., V]`."""
    host: HostWeight = getattr(module, HOST)
    return F.linear(hidden, host.held(), module.bias)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
