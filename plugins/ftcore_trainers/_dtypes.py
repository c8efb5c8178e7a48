"""Keeps trainable weights in the dtype that they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """Undo what a block does to the dtypes of trainable parameters.

    TRL's constructors round the adapter of a quantized model to bfloat16, where small optimizer updates get lost;
    ftcore keeps float32 masters and computes in the plan's dtype.
    """
    before = {name: (p, p.dtype, p.data) for name, p in model.named_parameters() if p.requires_grad}
    yield
    for parameter, dtype, data in before.values():
        if parameter.dtype != dtype:
            parameter.data = data.to(parameter.device)
