"""The checkpoint folder that all sides load, and what they adapt of it."""

from __future__ import annotations

from typing import Any

from stepbench.works import Work


def locate(work: Work) -> dict[str, Any]:
    """The work's `folder`, made of random weights of the shape when it is not there yet, `auto_class`, `targets`,
    `parameters`: what ftcore adapts, so that the peers do too."""
    from ftcore import checkpoint, pipeline
    from ftcore.api import validated
    from ftcore.parts import parts_pattern

    shape = "model.tiny=true" if work.tiny else f"model.shape={work.shape}"
    model = f"model.path={work.folder}" if work.folder else shape
    _, plan = pipeline.prepare(validated([f"+model={work.family}", model]))
    assert plan.run.model is not None
    family, targets = plan.family, list(plan.family.lora_targets)
    return {
        "folder": checkpoint.locate(plan.run.model, family),
        "auto_class": family.auto_class,
        "targets": parts_pattern(family.vision, [], targets) if family.vision else targets,
        "parameters": list(family.lora_parameters),
    }
