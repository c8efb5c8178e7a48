"""The checkpoint folder, with fewer layers where not all are run, and what is forecast for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stepbench import folder
from stepbench.sides.ftcore import model_words
from stepbench.works import Work

from contextbench.works import ContextWork

STANDS_IN = "H100"
"""Card whose times are forecast where there is no GPU."""


def prepared(work: ContextWork, *more: str) -> tuple[Any, Any]:
    """Hooks and plan of the whole model, without a checkpoint."""
    from ftcore import pipeline
    from ftcore.api import validated

    shape = "model.tiny=true" if work.tiny else f"model.shape={work.shape}"
    place = f"model.path={work.folder}" if work.folder else shape
    words = [place if word.startswith("model.path=") else word for word in model_words(work)]
    return pipeline.prepare(validated([*words, "+trainer=sft", "output_dir=nowhere", *more]))


def locate(work: ContextWork) -> dict[str, Any]:
    """What :func:`stepbench.folder.locate` finds, and `layers` of the whole model."""
    from ftcore import checkpoint

    _, plan = prepared(work)
    family, model = plan.family, plan.run.model
    shape = dict(checkpoint.settings(model, family))
    layers, place = int(shape["num_hidden_layers"]), work.folder
    if 0 < work.depth < layers:
        if work.folder:
            raise SystemExit("--layers cuts random checkpoints only: leave --folder out")
        name = f"{work.shape}-cut-to-{work.depth}"
        # Lists have an entry for each layer.
        cut = {k: v[: work.depth] if isinstance(v, list | tuple) and len(v) == layers else v for k, v in shape.items()}
        shapes = {**family.shapes, name: {**cut, "num_hidden_layers": work.depth}}
        place = checkpoint.locate(replace(model, shape=name, tiny=False), replace(family, shapes=shapes))
    fields = {name: getattr(work, name) for name in Work.__dataclass_fields__}
    return {**folder.locate(Work(**{**fields, "folder": place})), "layers": layers, "settings": shape}


def forecasts(
    work: ContextWork, gibs: Sequence[float], lengths: Sequence[int], card: float, host: float
) -> dict[str, Any]:
    """For the whole model under every cap: the longest row, and figures for it and for the length of the same place.

    Figures are bytes of the GPU (`peak`) and of the host (`host`), and `seconds` of a step. `available` is what the
    host has left.

    :param card: GiB of the card where there is no cap; 0: those of this machine's.
    :param host: GiB of the host; 0: those of this machine's.
    """
    from ftcore import host_memory
    from ftcore.cards import called, present
    from ftcore.config import Memory
    from ftcore.forecast import Forecast, free
    from ftcore.meta_model import on_meta
    from ftcore.step_time import Pace

    hooks, plan = prepared(work, *([f"host_memory={host}"] if host else []))
    found = Forecast.of(plan, on_meta(hooks, plan)[0])
    if isinstance(found, str):
        raise SystemExit(f"no forecast: {found}")
    gpu = plan.device.kind == "cuda"
    kind = present(plan.device) if gpu else called(STANDS_IN)
    assert kind is not None
    pace, memory = Pace(found, kind), Memory(work.memory)
    card = card or (plan.device.memory / 2**30 if gpu else kind.memory)
    longest: dict[str, int] = {}
    known: dict[str, dict[str, Any]] = {}
    for gib, length in zip(gibs, lengths, strict=True):
        room = free(gib or card)
        best = longest[f"{gib:g}"] = found.longest(memory, room)
        known[f"{gib:g}"] = {
            str(tokens): {
                "peak": found.peak(memory, 1, tokens, room),
                "host": found.host(memory, 1, tokens, room),
                "seconds": pace.micro_batch(memory, 1, tokens, room),
            }
            for tokens in {length, best}
            if tokens
        }
    return {"card": card, "available": host_memory.available(), "longest": longest, "known": known}
