"""Numbers that are not finite, put into a training step at a place of your choice.

    with poison(trainer, "gradient", steps={3}):
        trainer.train()

The places: `weight` (a trained one, for good), `input` (what the embedding gives), `loss`, `gradient`, and `optimizer`
(its first moment, for good). A reward that is not finite is a reward function's own business: let it return `nan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

PLACES = ("weight", "input", "loss", "gradient", "optimizer")


@contextmanager
def poison(
    trainer: Any, place: str, steps: Collection[int], value: float = math.nan, once: bool = False
) -> Iterator[None]:
    """Poison optimizer steps of a trainer of transformers' kind while the block runs.

    :param place: One of `PLACES`.
    :param steps: Optimizer steps, from 1.
    :param value: What is put there.
    :param once: Only the first time that a step is computed: what is computed again is sound.
    """
    seen: set[int] = set()

    def due() -> bool:
        step = trainer.state.global_step + 1
        if step not in steps or not trainer.model.training or (once and step in seen):
            return False
        seen.add(step)
        return True

    with ExitStack() as undo:
        _PUT[place](trainer, value, due, undo)
        yield


def _trained(trainer: Any) -> Any:
    return next(p for p in trainer.model.parameters() if p.requires_grad)


def _at_step_begin(trainer: Any, act: Callable[[], None], due: Callable[[], bool], undo: ExitStack) -> None:
    from transformers import TrainerCallback

    class AtStepBegin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if due():
                act()

    callback = AtStepBegin()
    trainer.add_callback(callback)
    undo.callback(trainer.remove_callback, callback)


def _weight(trainer: Any, value: float, due: Callable[[], bool], undo: ExitStack) -> None:
    def act() -> None:
        _trained(trainer).data.view(-1)[0] = value

    _at_step_begin(trainer, act, due, undo)


def _optimizer(trainer: Any, value: float, due: Callable[[], bool], undo: ExitStack) -> None:
    def act() -> None:
        state = trainer.optimizer.state[trainer.optimizer.param_groups[0]["params"][0]]
        state["exp_avg"].view(-1)[0] = value

    _at_step_begin(trainer, act, due, undo)


def _input(trainer: Any, value: float, due: Callable[[], bool], undo: ExitStack) -> None:
    def hook(module: Any, args: Any, output: Any) -> Any:
        return output * value if due() else output

    undo.callback(trainer.model.get_input_embeddings().register_forward_hook(hook).remove)


def _gradient(trainer: Any, value: float, due: Callable[[], bool], undo: ExitStack) -> None:
    def hook(parameter: Any) -> None:
        if due():
            parameter.grad.view(-1)[0] = value

    undo.callback(_trained(trainer).register_post_accumulate_grad_hook(hook).remove)


def _loss(trainer: Any, value: float, due: Callable[[], bool], undo: ExitStack) -> None:
    whole = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = whole(*args, **kwargs)
        return loss * value if due() else loss

    trainer.compute_loss = compute_loss
    undo.callback(vars(trainer).pop, "compute_loss", None)


_PUT = dict(zip(PLACES, (_weight, _input, _loss, _gradient, _optimizer), strict=True))
