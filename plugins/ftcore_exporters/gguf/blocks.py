"""Numbers into the blocks of a GGUF type, by `libgguf`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType as Type

from ftcore import Problem, Refused
from ftcore.errors import Exit
from ftcore_exporters.gguf.workers import Quantizers

if TYPE_CHECKING:
    import torch

LARGEST = 65504.0
"""What float16 holds, in which all block types store their scales."""


def packed(rows: torch.Tensor, kind: Type, name: str, quantizers: Quantizers) -> Iterator[Any]:
    """The bytes of whole rows in a type, piece by piece.

    :param rows: `[rows, width]` with a width of whole blocks, or `[width]` for a type without blocks.
    :param name: The tensor's, for the message.

    Raises Refused for values that are not finite, or too large for the type.
    """
    import torch

    _check(float(rows.abs().max()), kind, name)
    if kind is Type.F32:
        yield rows.to(torch.float32).contiguous().numpy().data
    elif kind is Type.F16:
        yield rows.to(torch.float16).contiguous().numpy().data
    elif kind is Type.BF16:
        yield rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().data
    else:
        yield from quantizers.blocks(rows.to(torch.float32).contiguous().numpy(), kind)


def _check(largest: float, kind: Type, name: str) -> None:
    if not largest < float("inf"):  # NaN is not less
        message = "holds values that are not finite"
        raise Refused(Problem(name, message, "the model is broken; export an earlier checkpoint", Exit.NUMERIC))
    if largest > LARGEST and kind not in (Type.F32, Type.BF16):
        message = f"holds a value of magnitude {largest:.3g}, too large for float16 and what is stored with its range"
        raise Refused(Problem(name, message, "choose f32 or bf16 in export.gguf.types", Exit.NUMERIC))
