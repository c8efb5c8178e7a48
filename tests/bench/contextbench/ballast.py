"""The memory of layers that are not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def ballast(model: Any, layers: int) -> list[Any]:
    """As many bytes as the layers that were cut away would hold, for as long as the list is kept.

    :param layers: Of the whole model.
    """
    import torch

    present = stack(model)
    size = held(present[-1])
    device = next(present.parameters()).device  # an embedding may be in host memory
    return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(layers - len(present))]


def stack(model: Any) -> Any:
    """The decoder's layers."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise SystemExit(f"the model has {len(lists)} lists of {count} modules: which are its layers is not clear")
    return lists[0]


def held(layer: Any) -> int:
    """Bytes of a layer: its weights, scales included, and for what is trained a gradient and AdamW's two moments."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(layer)}
    trained = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
    return sum(tensors.values()) + 3 * trained


def _tensors(layer: Any) -> Iterator[Any]:
    yield from layer.buffers()
    for parameter in layer.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # bitsandbytes' scales, and the scales of those
            yield state.absmax
            yield state.code
            if state.offset is not None:
                yield state.offset
            state = state.state2
