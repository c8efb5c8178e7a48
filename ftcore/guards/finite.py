"""Whether what is about to be kept is finite: weights that are trained, and what the optimizer knows of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ftcore.errors import Exit, FtcoreError


class NonFinite(FtcoreError):
    """Training cannot go on, or must not be kept, because numbers are not finite."""

    code = Exit.NUMERIC


def first_non_finite(model: Any, optimizer: Any = None) -> str | None:
    """Name of the first trained tensor with a number that is not finite; None where there is none.

    Waits for the device, and needs next to no memory on it.

    :param optimizer: Its parameters, of which the model may not know all, and its state are looked at as well.
    """
    import torch

    pairs = [(n, t) for n, t in _kept(model, optimizer) if t.is_floating_point() and t.numel()]
    # The largest magnitude: no second tensor of that size, as `isfinite` would make.
    found = [torch.linalg.vector_norm(t.detach(), math.inf).float().to("cpu", non_blocking=True) for _, t in pairs]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return next((name for (name, _), most in zip(pairs, found, strict=True) if not math.isfinite(most)), None)


def refuse_non_finite(what: str, model: Any, optimizer: Any = None) -> None:
    """Raise NonFinite where something in it is not finite.

    :param what: What is not kept then, such as `the checkpoint of step 8`.
    """
    name = first_non_finite(model, optimizer)
    if name is not None:
        raise NonFinite(
            f"{name} is not finite, so {what} is not kept\n"
            "    fix: lower trainer.learning_rate; with 'resume.allow=[trainer.learning_rate]' the same command goes "
            "on from the last good checkpoint"
        )


def _kept(model: Any, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for group in optimizer.param_groups if optimizer is not None else ():
        yield from (("a parameter of the optimizer", p) for p in group["params"] if id(p) not in names)
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        for key, value in state.items():
            if hasattr(value, "is_floating_point"):
                yield f"{key} of {names.get(id(parameter), 'a parameter')} in the optimizer", value
