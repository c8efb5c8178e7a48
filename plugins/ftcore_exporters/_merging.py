"""What every exporter of merged weights asks of a run."""

from __future__ import annotations

from collections.abc import Iterator

from ftcore import Plan, Problem

WRITERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Auto classes of models that answer in text."""


def value(setting: object) -> object:
    """A setting as it is written: of an enum, its value."""
    return getattr(setting, "value", setting)


def unmergeable(plan: Plan) -> Iterator[Problem]:
    """DoRA scales the whole weight, which is not there where it is quantized."""
    if plan.run.quantizer and value(getattr(plan.run.adapter, "variant", None)) == "dora":
        message = "DoRA over quantized weights cannot be merged exactly"
        yield Problem("export", message, "export the adapter, or train over 16-bit weights")


def makes_up_for_rounding(plan: Plan) -> bool:
    """LoftQ's adapter holds what rounding took, and is wrong over any weights but the quantized ones."""
    return plan.run.quantizer is not None and value(getattr(plan.run.adapter, "init", None)) == "loftq"


def not_writing(plan: Plan, name: str) -> Iterator[Problem]:
    """Engines that answer requests with text cannot be given a model that writes none."""
    if plan.family.auto_class not in WRITERS:
        message = f"{name} takes models that write text, and this one is loaded as {plan.family.auto_class}"
        yield Problem("export", message, "use '+export=[safetensors]'")


def reads_images(plan: Plan, name: str) -> Iterator[Problem]:
    """Exports that know the layers of text models alone."""
    if plan.family.vision is not None:
        message = f"{name} takes text models only, and {plan.run.model.name if plan.run.model else 'this'} reads images"
        yield Problem("export", message, "use '+export=[safetensors]'")
