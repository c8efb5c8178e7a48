"""`ftcore plan`: what would run, decided and checked, without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ftcore import checkpoint, pipeline, planning, rope
from ftcore import hooks as h
from ftcore.config import Memory
from ftcore.manager import spec_names
from ftcore.memory import micro_batch, wants_recompute
from ftcore.meta_model import on_meta
from ftcore.patching import INSIDE
from ftcore.report import heading, note, table
from ftcore.rows import iter_rows, local_files, sources
from ftcore.specs import PatchReport, Plan
from ftcore.tasks._config import config_of


def main(argv: list[str]) -> int:
    """Print the plan."""
    hooks, plan = pipeline.prepare(config_of(argv))
    model, patches = on_meta(hooks, plan)
    heading("Run")
    table(_settings(plan, model))
    planning.show(plan, model, lambda other: hooks.collect(h.ftcore_check_plan, plan=other))
    heading("Kernels")
    _show_patches(patches)
    heading("Stages: who answers (first asked first, ~ wraps)")
    table((name.removeprefix(h.PREFIX), ", ".join(hooks.who_answers(getattr(h, name))) or "-") for name in spec_names())
    note("\nNo problems found.")
    return 0


def _settings(plan: Plan, model: Any) -> Iterable[tuple[str, str]]:
    run = plan.run
    assert run.model is not None
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield "model", f"{run.model.name}, {checkpoint.find(run.model, plan.family)}"
    yield "device", f"{plan.device.name}, computing in {plan.dtype}"
    if scaled := rope.scaling(run.model, plan.family):
        length = run.model.max_length or checkpoint.context_length(run.model, plan.family)
        how = f"{scaled.get('rope_type', 'its own kind')} x{scaled.get('factor', 1):g}"
        yield "context", f"{length or 0:,} tokens, RoPE scaled by {how}"
    yield "weights", f"{run.quantizer.name} (frozen layers)" if run.quantizer else plan.dtype
    yield "adapter", run.adapter.name if run.adapter else "none"
    yield "parameters", f"{total:,} in all, {trained:,} trained ({trained / total:.2%})"
    if run.trainer and plan.format:
        rows = _count_rows(plan)
        source = ", ".join(sources(run.data.path)) if run.data and run.data.path else "shipped sample"
        counted = "its rows are known once it is read" if rows is None else f"{rows:,} rows"
        yield "data", f"{source} as {plan.format.name}, {counted}"
        micro = micro_batch(plan)
        yield "trainer", run.trainer.name
        accumulated = run.trainer.global_batch // micro
        yield "batch", f"{run.trainer.global_batch} rows a step = {micro} x {accumulated} accumulated"
        yield "steps", _or_unknown(_steps(plan, rows))
        if run.memory is Memory.auto and plan.device.kind == "cuda":
            limit = "the GPU has free" if run.memory_limit is None else f"{run.memory_limit:g} GiB allow"
            yield "memory", f"auto: as little recomputed as what {limit}, decided at the first batch"
        else:
            recomputed = "every layer" if wants_recompute(plan, model) else "nothing"
            yield "memory", f"{run.memory.value}: {recomputed} recomputed"
    yield "exports", ", ".join(run.export) or "none (the adapter or model is always saved)"
    yield "run folder", str(plan.output_dir)


def _count_rows(plan: Plan) -> int | None:
    assert plan.format is not None and plan.run.data is not None
    if plan.run.data.streaming or plan.run.data.weights:
        return None
    places = [local_files(path) for path in sources(plan.run.data.path or plan.format.sample)]
    if None in places:
        return None
    rows = sum(1 for files in places for file in files or () for _ in iter_rows(file, lambda problem: None))
    held = plan.run.data.eval_size if not plan.run.data.eval_path else 0
    return rows - math.ceil(rows * held if held < 1 else held)


def _steps(plan: Plan, rows: int | None) -> int | None:
    trainer = plan.run.trainer
    assert trainer is not None
    if trainer.max_steps > 0:
        return trainer.max_steps
    if rows is None or trainer.packing:
        return None
    # A group of completions shares one prompt, so fewer rows are used up a step.
    per_row = getattr(trainer, "num_generations", 1)
    return math.ceil(math.ceil(rows * per_row / trainer.global_batch) * trainer.epochs)


def _or_unknown(number: int | None) -> str:
    return "known once the data is read" if number is None else f"{number:,}"


def _show_patches(patches: PatchReport) -> None:
    counts = patches.counts().items()
    claimed = [(role, f"{kernel} on {count} module{'s' if count > 1 else ''}") for (role, kernel), count in counts]
    # What a whole layer took over runs in its kernel; only the rest is transformers' own.
    skipped = [
        (skip.role, skip.reason if skip.reason == INSIDE else f"plain transformers: {skip.reason}")
        for skip in patches.skipped
    ]
    table([*claimed, *skipped])
