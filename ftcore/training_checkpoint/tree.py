"""State of optimizers, schedulers and random generators as JSON and safetensors: nothing in it can run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused

if TYPE_CHECKING:
    import torch

TENSOR, TUPLE, PAIRS = "$tensor", "$tuple", "$pairs"
"""Marks for what JSON does not have: tensors, tuples, and mappings whose keys are not all strings."""


def write(folder: Path, name: str, state: Any) -> None:
    """Write `state` as `name.json` and, where it holds tensors, `name.safetensors`.

    Raises TypeError for a value that is no number, string, tensor, list, tuple or mapping of such.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    plain = _plain(state, tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(plain), encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    """What `write` wrote, with its tensors on the CPU.

    Raises Refused when it is not there: a run that goes on without its state would be another run.
    """
    from safetensors.torch import load_file

    file, values = folder / f"{name}.json", folder / f"{name}.safetensors"
    if not file.is_file():
        message = f"{folder} holds no {file.name}"
        raise Refused(Problem("resume", message, "go on from another checkpoint", Exit.MISSING_INPUT))
    tensors = load_file(values) if values.is_file() else {}
    return _restored(json.loads(file.read_text(encoding="utf-8")), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, np.ndarray):
        return {TUPLE: ["ndarray", str(value.dtype), value.tolist()]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _plain(inner, tensors) for key, inner in value.items()}
        return {PAIRS: [[_plain(key, tensors), _plain(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: ["tuple", *(_plain(inner, tensors) for inner in value)]}
    if isinstance(value, list):
        return [_plain(inner, tensors) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds no {type(value).__module__}.{type(value).__qualname__}")


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import numpy as np

    if isinstance(value, list):
        return [_restored(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        kind, *parts = value[TUPLE]
        if kind == "ndarray":
            return np.array(parts[1], dtype=parts[0])
        return tuple(_restored(inner, tensors) for inner in parts)
    if PAIRS in value:
        return {_restored(key, tensors): _restored(inner, tensors) for key, inner in value[PAIRS]}
    return {key: _restored(inner, tensors) for key, inner in value.items()}
