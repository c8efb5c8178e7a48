"""`trainer.micro_batch=-1`: as many rows at once as make a step on this GPU faster, by the forecast."""

from __future__ import annotations

from dataclasses import replace

from ftcore.cards import present
from ftcore.config import Memory
from ftcore.forecast import Forecast, allowed, free
from ftcore.manager import Hooks
from ftcore.report import note
from ftcore.specs import Plan
from ftcore.step_time import Pace

ASKED = -1
"""Value of `trainer.micro_batch` that leaves it to the forecast."""
WORTH = 0.95
"""Part of the best rate that fewer rows have to reach: below it more rows are worth their memory."""


def decided(hooks: Hooks, plan: Plan) -> Plan:
    """The plan with a number of rows, where it was left open; that of 0 where there is no GPU or no forecast."""
    trainer = plan.run.trainer
    if trainer is None or trainer.micro_batch != ASKED:
        return plan
    rows, reason = 0, "there is no GPU"
    if plan.device.kind == "cuda":
        from ftcore.meta_model import on_meta

        forecast = Forecast.of(plan, on_meta(hooks, plan)[0])
        if isinstance(forecast, str):
            reason = forecast
        else:
            room = allowed(plan, free(plan.device.memory / 2**30))
            rows, reason = best_rows(Pace(forecast, present(plan.device)), plan.run.memory, room)
    note(f"trainer.micro_batch: {rows or 'as without a forecast'}, because {reason}")
    return replace(plan, run=replace(plan.run, trainer=replace(trainer, micro_batch=rows)))


def best_rows(pace: Pace, memory: Memory, room: int) -> tuple[int, str]:
    """The fewest rows that come near the best rate of all that fit so many bytes, and why.

    Rows past that gain next to nothing, and their activations would be computed again sooner.
    """
    forecast = pace.forecast
    assert forecast.plan.run.trainer is not None
    whole, length = forecast.plan.run.trainer.global_batch, forecast.length
    divisors = [rows for rows in range(1, whole + 1) if whole % rows == 0 and rows >= forecast.passes.least_rows]
    rates = {
        rows: pace.rate(memory, rows, length, room) for rows in divisors if forecast.fits(memory, rows, length, room)
    }
    if not rates:
        return divisors[0], f"no number of rows of {length:,} tokens fits by the forecast"
    best = max(rates.values())
    rows = min(rows for rows, rate in rates.items() if rate >= WORTH * best)
    return rows, f"by the forecast that makes ~{rates[rows]:,.0f} tokens a second on {pace.card.name}"
