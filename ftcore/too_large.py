"""Runs that cannot fit a GPU, whatever the batch: refused before a weight is read, or fetched."""

from __future__ import annotations

import os

from ftcore import hooks as h
from ftcore.config import Memory, Optimizer
from ftcore.errors import Problem, Refused
from ftcore.forecast import Forecast, free
from ftcore.manager import Hooks
from ftcore.planning import Problems, next_setting, no_problems
from ftcore.report import size
from ftcore.specs import Plan

PAGED = (Optimizer.paged_adamw_8bit,)
"""Optimizers whose state may leave the GPU."""


def refuse_too_large(hooks: Hooks, plan: Plan) -> None:
    """Raises Refused where weights, gradients and moments alone are more than the GPU has free.

    Nothing is said of runs whose memory is not counted, of CPUs, and of several processes, which may share the weights.
    """
    if plan.device.kind != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    from ftcore.meta_model import on_meta

    forecast = Forecast.of(plan, on_meta(hooks, plan)[0])
    if isinstance(forecast, str):
        return
    problem = found(forecast, plan.device.memory, lambda other: hooks.collect(h.ftcore_check_plan, plan=other))
    if problem is not None:
        raise Refused(problem)


def found(forecast: Forecast, there: int, problems: Problems = no_problems) -> Problem | None:
    """What is wrong with a run on a GPU that has so many bytes free, if the run cannot fit.

    :param problems: What is said against a plan with other settings.
    """
    plan = forecast.plan
    assert plan.run.trainer is not None
    leaves = sum(forecast.leaving) if plan.run.memory is Memory.offload else 0
    paged = plan.run.trainer.optimizer in PAGED
    weights, gradients, moments = forecast.weights - leaves, forecast.gradients, 0 if paged else forecast.moments
    if weights + gradients + moments <= there:
        return None
    parts = f"weights {size(weights)}, gradients {size(gradients)}, moments of the optimizer {size(moments)}"
    return Problem(
        "model",
        f"training takes {size(weights + gradients + moments)} of the GPU before any row is there ({parts}), and "
        f"{size(there)} are free",
        next_setting(forecast, free(there / 2**30), problems),
    )
