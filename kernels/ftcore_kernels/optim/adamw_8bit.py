"""AdamW that keeps its moments in 8 bits: what bitsandbytes' `AdamW8bit` does, in one launch for many parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

from ftcore_kernels.reference._hash import WORD, mix
from ftcore_kernels.reference.adamw_8bit import BLOCK, Tensors, Update


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with blockwise 8-bit moments (Dettmers et al. 2021, arXiv 2110.02861).

    Triton on a GPU, plain PyTorch elsewhere; `ftcore_kernels.reference.adamw_8bit` defines the arithmetic. The state of
    a parameter is `step`, a number, and `m` and `v` in its shape: uint8 codes with the fp32 scales `absmax_m` and
    `absmax_v` of every 256 elements, or fp32 numbers for a small parameter. That is 2.03 bytes a parameter.

    :param params: Parameters or groups, as for every optimizer. Dense gradients only.
    :param lr: Learning rate; a number, not a tensor on the device.
    :param betas: Decay rates of the moments.
    :param eps: Added to the root of the second moment.
    :param weight_decay: Decoupled weight decay.
    :param min_8bit_size: Parameters of fewer elements have a state in fp32.
    :param rounding: Seed of bf16 parameters' rounding by chance, which loses no small step; the same seed gives the
        same steps. None rounds to the nearest.
    """

    clip_coefficient: torch.Tensor | None = None
    """One fp32 number on the device that the next step multiplies every gradient by; the step sets it to None."""
    found_inf: torch.Tensor | None = None
    """One fp32 number on the device; unless it is 0, the next step changes nothing there, as PyTorch's fused optimizers
    have it. The step sets it to None, and counts: `uncount_step` takes that back."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        rounding: int | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be >= 0, betas {betas} in [0, 1)"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "min_8bit_size": min_8bit_size, "rounding": rounding})
        self._tables: dict[tuple[int, int], Any] = {}
        self._counted: list[dict[str, Any]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("rounding", None)  # saved by an older version
        self._tables = {}
        self._counted = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; `closure` computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip, self.clip_coefficient = self.clip_coefficient, None
        skip, self.found_inf = self.found_inf, None
        self._counted = []
        for number, group in enumerate(self.param_groups):
            # Parameters share a step number unless they joined, or had no gradient, at some time.
            together: dict[tuple[torch.device, int], list[Tensors]] = {}
            copies: list[tuple[torch.Tensor, torch.Tensor]] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    tensors = self._tensors(parameter, group["min_8bit_size"])
                    if tensors.param is not parameter:
                        copies.append((parameter, tensors.param))
                    key = (parameter.device, self.state[parameter]["step"])
                    together.setdefault(key, []).append(tensors)
            for part, ((device, step), members) in enumerate(together.items()):
                rates = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"]
                update = Update(step, *rates, seed_of(group["rounding"], number, part))
                self._update((number, part), device, members, update, clip, skip)
            for parameter, copy in copies:
                parameter.copy_(copy)
        return loss

    def uncount_step(self) -> None:
        """Make the last step one that was not made: to be called where `found_inf` kept it from changing anything."""
        for state in self._counted:
            state["step"] -= 1
        self._counted = []

    def _tensors(self, parameter: torch.Tensor, min_8bit_size: int) -> Tensors:
        """The parameter with its gradient and its state, made if there is none; counts the step."""
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError("AdamW8bit takes no sparse gradients")
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            blocks = -(-parameter.numel() // BLOCK)
            eight_bit = parameter.numel() >= min_8bit_size
            for name in ("m", "v"):
                dtype = torch.uint8 if eight_bit else torch.float32
                state[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                if eight_bit:
                    state[f"absmax_{name}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        state["step"] += 1
        self._counted.append(state)
        written = parameter if parameter.is_contiguous() else parameter.contiguous()
        return Tensors(written, grad.contiguous(), state["m"], state["v"], state.get("absmax_m"), state.get("absmax_v"))

    def _update(
        self,
        place: tuple[int, int],
        device: torch.device,
        tensors: list[Tensors],
        update: Update,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        """Call the op, or its twin."""
        if runs_triton(device):
            from ftcore_kernels.ops import adamw_8bit as op

            op.adamw_8bit(tensors, update, clip, self._tables.setdefault(place, op.Table()), skip)
        else:
            from ftcore_kernels.reference import adamw_8bit as twin

            twin.adamw_8bit(tensors, update, clip, skip)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, to the last bit: PyTorch's own would make all of it the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def seed_of(rounding: int | None, group: int, part: int) -> int | None:
    """Of the rounding of parameters that are updated together: no two such lots have the same noise."""
    if rounding is None:
        return None
    return mix((mix((mix(rounding & WORD) + group) & WORD) + part) & WORD)


_TRITON = importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton op serves tensors there."""
    return _TRITON and device.type == "cuda"
