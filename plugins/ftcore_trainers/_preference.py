"""Keys and checks that the trainers on preferences share. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from ftcore import Plan, Problem
from ftcore.catalog import nearest

OWNED_BY_PREFERENCES = frozenset({"padding_free", "model_init_kwargs", "pad_token", "padding_value"})
"""Arguments of TRL's that do not work, or work on a model that it loads itself."""
OWNED_BY_REFERENCE = frozenset(
    {"precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
)
BEGINS_AS_NOTHING = ("default", "gaussian")
"""`adapter.init` under which a new adapter adds nothing before it is trained, because B is 0."""


class ReferenceModel(Enum):
    """What the policy is compared with."""

    start = "start"
    base = "base"


def problems(plan: Plan) -> Iterator[Problem]:
    """What no trainer on preferences does."""
    assert plan.run.trainer is not None
    name, adapter = plan.run.trainer.name, plan.run.adapter
    if plan.run.trainer.packing:
        message = f"{name} compares answers row by row, so its rows are not packed"
        yield Problem("trainer.packing", message, "leave trainer.packing out")
    if getattr(adapter, "dropout", 0.0) and plan.run.trainer.args.get("disable_dropout", True):
        message = f"{name} compares log-probabilities, and switches off the dropout that would make them noisy"
        yield Problem("adapter.dropout", message, "leave it out, or add +trainer.args.disable_dropout=false")


def reference_problems(plan: Plan, which: ReferenceModel, precompute: bool) -> Iterator[Problem]:
    """Whether there is such a reference model."""
    adapter: Any = plan.run.adapter
    init = getattr(getattr(adapter, "init", None), "value", "default")
    if which is ReferenceModel.base and init not in BEGINS_AS_NOTHING and not adapter.path:
        message = f"adapter.init={init} moves a part of the weights into the adapter: without it the model is no base"
        yield Problem("trainer.reference", message, "use trainer.reference=start")
    if precompute and plan.run.data is not None and plan.run.data.streaming:
        message = "a streamed data set cannot be read twice"
        yield Problem("trainer.precompute_reference", message, "leave it out, or set data.streaming=false")


def in_range(config: Any, above_0: Sequence[str] = (), from_0: Sequence[str] = ()) -> Iterator[Problem]:
    """Every number is in its range."""
    for key in above_0:
        if not 0 < getattr(config, key) < math.inf:
            yield Problem(f"trainer.{key}", f"is {getattr(config, key)}", "give a number above 0")
    for key in from_0:
        if not 0 <= getattr(config, key) < math.inf:
            yield Problem(f"trainer.{key}", f"is {getattr(config, key)}", "give 0 or a number above it")


def unknown_loss(name: Any, known: Sequence[str]) -> Iterator[Problem]:
    """Whether there is such a loss."""
    if name not in known:
        near = nearest(str(name), known)
        fix = f"did you mean trainer.loss_type={near}?" if near else f"use one of {', '.join(known)}"
        yield Problem("trainer.loss_type", f"'{name}' is no loss type", fix)


def not_streamed(plan: Plan) -> Iterator[Problem]:
    """For trainers of TRL's that tokenize all rows first."""
    assert plan.run.trainer is not None
    if plan.run.data is not None and plan.run.data.streaming:
        message = f"{plan.run.trainer.name} tokenizes all rows before it trains"
        yield Problem("data.streaming", message, "leave data.streaming out")
