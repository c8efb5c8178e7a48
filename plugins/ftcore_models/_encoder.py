"""What encoders share: a head by a trainer of their own, and no next token to predict."""

from __future__ import annotations

from ftcore import Limit, Plan


def own_head(fix: str, reason: str) -> Limit:
    """Refuses trainers that keep the family's own head, as those of decoders do."""

    def applies(plan: Plan) -> bool:
        return plan.trainer is not None and plan.trainer.auto_class is None

    return Limit(key="trainer", reason=reason, fix=fix, applies=applies)


ENCODER = own_head("use +trainer=classify or +trainer=embed", "an encoder sees later tokens, so it learns no next one")


def _longer(plan: Plan) -> bool:
    model = plan.run.model
    return model is not None and bool(model.max_length or model.rope_scaling)


LEARNED_POSITIONS = Limit(
    key="model.max_length",
    reason="positions are learned one by one, so there is no RoPE to scale and the context stays as it is",
    fix="leave model.max_length and model.rope_scaling out",
    applies=_longer,
)
