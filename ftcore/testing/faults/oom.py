"""A device whose memory is short, without one.

with out_of_memory(model, passes={3}):
    trainer.train()
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. (a fault of ftcore.testing)"


class Passes:
    """How many passes of the kind there were, and how many of them ran out of memory."""

    def __init__(self) -> None:
        self.seen = 0
        self.failed = 0


@contextmanager
def out_of_memory(
    model: Any,
    passes: Collection[int] = (),
    rows: int | None = None,
    within_backward: bool = False,
    without_gradients: bool = False,
) -> Iterator[Passes]:
    """Raise `torch.OutOfMemoryError` in passes through a model while the block runs.

    :param passes: Which passes fail, from 1.
    :param rows: Every pass of more rows fails, as on a small GPU.
    :param within_backward: Fail in the backward of such a pass, when half of the gradients are applied.
    :param without_gradients: Passes of evaluations and of generation fail and are counted, instead of those that train.
    """
    import torch

    count = Passes()
    late = False

    def fail() -> None:
        count.failed += 1
        raise torch.OutOfMemoryError(MESSAGE)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal late
        if torch.is_grad_enabled() == without_gradients:
            return
        count.seen += 1
        size = next((len(v) for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.dim()), 0)
        if count.seen in passes or (rows is not None and size > rows):
            if not within_backward:
                fail()
            late = True

    def applied(parameter: Any) -> None:
        nonlocal late
        if late:
            late = False
            fail()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
    hooks.append(trained[len(trained) // 2].register_post_accumulate_grad_hook(applied))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
