"""The checkpoint folder that all sides load."""

from __future__ import annotations

from stepbench.works import Work


def locate(work: Work) -> str:
    """ftcore's folder of random weights of the shape, made when it is not there yet."""
    from ftcore import checkpoint, pipeline
    from ftcore.api import validated

    shape = "model.tiny=true" if work.tiny else f"model.shape={work.shape}"
    _, plan = pipeline.prepare(validated([f"+model={work.family}", shape]))
    assert plan.run.model is not None
    return checkpoint.locate(plan.run.model, plan.family)
