"""Whether a saved adapter is one for this run: of the same kind of model, and in the parts that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ftcore import Plan, Problem, Refused
from ftcore.errors import Exit
from ftcore_adapters._heads import TASKS


def of_another_task(plan: Plan, saved: Mapping[str, Any], folder: str) -> Iterator[Problem]:
    """One for text does not know the head of a classifier, which would stay as it was drawn, and the reverse."""
    own, task = saved.get("task_type"), TASKS.get(plan.family.auto_class, "CAUSAL_LM")
    if own and task and own != task:
        message = f"the adapter saved in {folder} is one for {own}, and this run trains for {task}"
        fix = "merge it first: ftcore export run=RUN '+export=[safetensors]', then model.path=RUN/export/safetensors"
        yield Problem("adapter.path", message, fix)


@contextmanager
def of_other_shapes(folder: str) -> Iterator[None]:
    """Raises Refused where torch finds that saved weights are of other shapes than the model's."""
    try:
        yield
    except RuntimeError as error:
        strange = next((line.strip() for line in str(error).splitlines() if "size mismatch for" in line), None)
        if strange is None:
            raise
        message = f"the adapter saved in {folder} is one of another model, or of another head: {strange}"
        fix = "give the base that it was trained on, and as many classes"
        raise Refused(Problem("adapter.path", message, fix, Exit.DATA)) from error


def in_other_parts(plan: Plan, saved: Mapping[str, Any], asked: list[str] | str, folder: str) -> Iterator[Problem]:
    """Of a model that reads images, whose parts stand in the saved adapter as one expression.

    :param asked: the expression of the run.
    """
    config: Any = plan.run.adapter
    kept = saved.get("target_modules")
    for key in ("parts", "targets"):
        if plan.family.vision and getattr(config, key) and isinstance(kept, str) and kept != asked:
            message = f"is {getattr(config, key)}, but the adapter saved in {folder} is one of other layers"
            yield Problem(f"adapter.{key}", message, f"a saved adapter keeps its layers: leave adapter.{key} out")
