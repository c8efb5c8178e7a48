"""Limits on packed rows: where one document would be seen by the next."""

from __future__ import annotations

from ftcore import Limit, Plan


def no_packing(reason: str, from_length: int = 0) -> Limit:
    """Packing refused, from rows of `from_length` tokens on."""

    def applies(plan: Plan) -> bool:
        trainer = plan.run.trainer
        return trainer is not None and trainer.packing and trainer.max_length >= from_length

    fix = "use trainer.packing=false" + (f", or trainer.max_length={from_length - 1}" if from_length else "")
    return Limit(key="trainer.packing", reason=reason, fix=fix, applies=applies)
