"""What `ftcore plugins model/NAME` says of a family besides its keys."""

from __future__ import annotations

from ftcore.coverage import TRAITS, coverage
from ftcore.report import heading, note, table
from ftcore.specs import ModelFamily


def describe(family: ModelFamily) -> None:
    """Checkpoints, kernels for each role, LoRA targets, chat facts, recommended settings, and limits."""
    heading("Checkpoints")
    note("  of type " + ", ".join(family.model_types))
    table((name,) for name in family.checkpoints)
    heading("Kernels")
    rows = coverage(family)
    table(
        ((row.role.name, row.role.module, ", ".join(row.sets) or "none", "; ".join(row.reasons)) for row in rows),
        header=("role", "module", "kernel sets", "why not others"),
    )
    if traits := sorted({trait for role in family.roles for trait in role.traits}):
        heading("Traits")
        table((trait, TRAITS.get(trait, "")) for trait in traits)
    heading("LoRA")
    parameters = [("parameters", ", ".join(family.lora_parameters))] if family.lora_parameters else []
    table([("linear layers", ", ".join(family.lora_targets)), *parameters])
    if chat := family.chat:
        heading("Chat")
        thinking = [("thinking", " ... ".join(chat.thinking))] if chat.thinking else []
        system = "yes" if chat.system else "no"
        table([("turn ends", " ".join(chat.turn_ends)), ("system message", system), *thinking])
    if family.sampling:
        heading("Recommended settings")
        table(
            (kind, ", ".join(f"{key}={value}" for key, value in keys.items())) for kind, keys in family.sampling.items()
        )
    if family.limits:
        heading("Limits")
        table((limit.key, limit.reason) for limit in family.limits)
