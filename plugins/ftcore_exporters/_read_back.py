"""What a library makes of an exported folder, held against the trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Checkpoint

if TYPE_CHECKING:
    from ftcore.agreement import Tolerance


SPARE = 1.2
"""What loading a model takes, over the size of its weights."""


def careful(checkpoint: Checkpoint, name: str, needed: int, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` finds; a reason in its place where there is no room for a second model, or the library fails.

    The artifact is written and the model is trained: nothing that goes wrong here is worth losing either.

    :param name: the library's.
    :param needed: bytes of the weights that are loaded.
    """
    from ftcore.read_back import WITHOUT_TEXT
    from ftcore.report import note, size

    found: dict[str, Any] = {"verified": False, "consumer": name}
    if checkpoint.plan.family.auto_class in WITHOUT_TEXT:
        return {**found, "reason": "it reads or writes recordings, on which it is not compared"}
    if (free := _free(checkpoint)) < SPARE * needed:
        return {**found, "reason": f"not read back: {size(needed)} of weights do not fit into {size(free)} of memory"}
    try:
        return read()
    except Exception as error:  # whatever a library raises for what it does not take
        reason = f"{name} does not load it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        note(f"warning: {reason}")
        return {**found, "reason": reason}


def _free(checkpoint: Checkpoint) -> int:
    """Bytes of memory that the host, and the GPU where the model is on one, have left."""
    import psutil
    import torch

    free: int = psutil.virtual_memory().available
    device = checkpoint.base().device
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def compared(
    checkpoint: Checkpoint, model: Any, folder: Path, name: str, kind: str = "", within: Tolerance | None = None
) -> dict[str, Any]:
    """`ftcore.read_back.read_back` of a model that was loaded from `folder`.

    :param name: the library's.
    :param kind: `f32`, `f16` or `bf16` where the weights are to be the trained model's; empty where they are packed,
        whose distance is only reported.
    """
    from transformers import AutoTokenizer

    from ftcore.consumers import Transformers
    from ftcore.probes import texts
    from ftcore.read_back import read_back

    rendered = texts(checkpoint.plan, checkpoint.tokenizer)[1]
    consumer = Transformers(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), rendered)
    consumer.name = name
    try:
        return read_back(checkpoint, consumer, kind, within)
    finally:
        consumer.close()


def joined(found: dict[str, Any], objection: str | None) -> dict[str, Any]:
    """The checks with one more objection."""
    if objection is None:
        return found
    reasons = [objection, *([found["reason"]] if "reason" in found else [])]
    return {**found, "verified": False, "reason": "; ".join(reasons)}
