"""Which layers of a model that reads images are adapted: its sides, and kinds of layers."""

from __future__ import annotations

from collections.abc import Sequence

from ftcore.specs import Vision

SIDES, KINDS = ("vision", "language"), ("attention", "mlp")
PARTS = (*SIDES, *KINDS)


def parts_pattern(vision: Vision, parts: Sequence[str], names: Sequence[str]) -> str:
    """The regular expression of the paths of the linear layers called `names` in the chosen parts.

    `vision` and `language` choose the model's sides, `attention` and `mlp` the kinds of layers; of what is not spoken
    of all is taken.
    """
    sides = [vision.parts[part] for part in SIDES if part in parts or not set(SIDES) & set(parts)]
    kinds = [vision.parts[part] for part in KINDS if part in parts or not set(KINDS) & set(parts)]
    return rf"(?:.*\.)?(?:{'|'.join(sides)})\.(?:.*\.)?(?:{'|'.join(kinds)})\.(?:.*\.)?(?:{'|'.join(names)})"
