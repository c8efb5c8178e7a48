"""What core checks in every plan, cheapest first. None of it imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ftcore import checkpoint, drift, rewards, rope, vocabulary
from ftcore.cards import called, cards
from ftcore.catalog import installed
from ftcore.defaults.check_data import check_evaluation, check_rows, check_sources
from ftcore.defaults.check_trainer import check_arguments, check_numbers
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.locks import is_held
from ftcore.manager import import_function, selected_options
from ftcore.resuming import NEVER
from ftcore.run_state import state_of
from ftcore.specs import Plan


@hookimpl(trylast=True)
def ftcore_check_plan(plan: Plan) -> Sequence[Problem]:
    """Missing packages, impossible combinations, unknown trainer arguments, missing files, bad rows."""
    assert plan.run.model is not None
    found = [
        *requirements(plan),
        *_selection(plan),
        *_combinations(plan),
        *_asked_about(plan),
        *_limits(plan),
        *check_arguments(plan),
        *check_numbers(plan),
        *check_evaluation(plan),
        *check_sources(plan),
        *_folders(plan),
        *reward_functions(plan),
        *checkpoint.problems(plan.run.model, plan.family),
        *_quantized(plan),
        *_context(plan),
    ]
    # Rows are read last and only for a plan that is sound otherwise: it may take a while.
    return found or [*check_rows(plan)]


def requirements(plan: Plan) -> Iterator[Problem]:
    """Packages that the selected plugins need are there."""
    from importlib_metadata import PackageNotFoundError, version
    from packaging.requirements import Requirement

    for option in selected_options(plan.run, installed()):
        for text in getattr(option.load(), "REQUIRES", ()):
            need = Requirement(text)
            try:
                have = version(need.name)
            except PackageNotFoundError:
                yield Problem(f"{option.kind}={option.name}", f"needs the package {need.name}", f"pip install '{text}'")
                continue
            if not need.specifier.contains(have, prereleases=True):
                yield Problem(
                    f"{option.kind}={option.name}", f"needs {text}, but {have} is installed", f"pip install '{text}'"
                )


def _selection(plan: Plan) -> Iterator[Problem]:
    run = plan.run
    for info in plan.plugins:
        if info.name.startswith("plugins/") and not info.hooks:
            fix = "name a function after a hook, and put @ftcore.hookimpl above it"
            yield Problem("plugins", f"{info.origin} holds no hooks", fix)
    if run.trainer is None:
        return
    if run.adapter is None:
        fix = "use adapter=lora, or adapter=full for all weights"
        yield Problem("adapter", "none is selected, so nothing would be trained", fix)
    if run.data is None:
        yield Problem("data", "no format is selected", "use data=auto")
    own = ["rewards"] if run.rewards else ["reward"] if run.reward else []
    if own and plan.trainer and not plan.trainer.wants_rewards:
        yield Problem(
            own[0], f"{run.trainer.name} uses no rewards", f"leave {own[0]} out, or select a trainer that does"
        )


def _combinations(plan: Plan) -> Iterator[Problem]:
    run, trainer, form = plan.run, plan.trainer, plan.format
    if trainer and form and run.trainer and form.shape not in trainer.accepts:
        name, takes = run.trainer.name, ", ".join(sorted(trainer.accepts))
        fitting = getattr(installed().find("trainer", name).load(), "SELECTS", {}).get("data")
        fix = (
            f"give rows of the format data={fitting}"
            if fitting
            else f"give {' or '.join(sorted(trainer.accepts))} rows"
        )
        detected = ", name their format by data=NAME" if run.data and run.data.name == "auto" else ""
        message = f"{form.name} rows have the shape '{form.shape}', but {name} takes {takes}"
        yield Problem("data", message, f"{fix}{detected}, or select another trainer")
    if form and run.data and run.data.format and run.data.format != form.name:
        message = f"data={run.data.name} reads {form.name} rows, so '{run.data.format}' cannot apply"
        yield Problem("data.format", message, f"write data={run.data.format}")
    for role, kernel_set in run.patching.prefer.items():
        roles = sorted({k.role for k in plan.kernels})
        offered = sorted({k.name.partition(".")[0] for k in plan.kernels if k.role == role})
        if kernel_set not in offered:
            fix = (
                f"offered by: {', '.join(offered)}" if offered else f"roles with kernels: {', '.join(roles) or 'none'}"
            )
            yield Problem(
                f"patching.prefer.{role}", f"no selected kernel set '{kernel_set}' offers a kernel for {role}", fix
            )
    if run.model and run.model.dtype not in ("auto", "float32", "bfloat16", "float16"):
        yield Problem("model.dtype", f"'{run.model.dtype}' is no dtype", "use auto, float32, bfloat16 or float16")
    if run.memory.value == "offload" and plan.device.kind != "cuda":
        message = "`offload` moves layer inputs from a GPU to host memory, and there is no GPU"
        yield Problem("memory", message, "use memory=least for the smallest footprint")
    if run.memory_limit is not None and run.memory_limit <= 0:
        yield Problem("memory_limit", f"is {run.memory_limit:g}", "give GiB, such as 20, or leave it out")
    elif run.memory_limit is not None and run.memory.value != "auto":
        message = f"is for memory=auto, and memory is {run.memory.value}"
        yield Problem("memory_limit", message, "leave one of the two out")
    if run.model:
        yield from vocabulary.problems(run.model.new_tokens)


def _asked_about(plan: Plan) -> Iterator[Problem]:
    """The GPU and the host that a forecast is asked for."""
    run = plan.run
    if run.gpu_memory is not None and run.gpu_memory <= 0:
        yield Problem("gpu_memory", f"is {run.gpu_memory:g}", "give the GiB of a GPU, such as 24, or leave it out")
    if run.host_memory is not None and run.host_memory < 0:
        yield Problem("host_memory", f"is {run.host_memory:g}", "give the GiB of the host, such as 64, or leave it out")
    if run.gpu is not None and called(run.gpu) is None:
        yield Problem("gpu", f"no figures of a GPU called '{run.gpu}' are known", f"known: {', '.join(cards())}")


def _limits(plan: Plan) -> Iterator[Problem]:
    """What the family says that it cannot do."""
    for limit in plan.family.limits:
        if limit.applies(plan):
            yield Problem(limit.key, limit.reason, limit.fix)


def _folders(plan: Plan) -> Iterator[Problem]:
    """The run folder can be made, and what `resume` names is a checkpoint."""
    run, there = plan.run, plan.output_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield Problem("output_dir", f"{there} is a file", "name a folder")
    elif run.trainer is not None and not os.access(there, os.W_OK):
        yield Problem("output_dir", f"nothing can be written into {there}", "name another folder", Exit.IO)
    if run.trainer is None:
        return
    if is_held(plan.output_dir):
        message = f"{plan.output_dir} is written by another process"
        yield Problem("output_dir", message, "wait for it, or name another folder", Exit.BUSY)
        return
    asked = run.resume.checkpoint
    if asked in (None, NEVER):
        kept = [name for name in RUN_FILES if (plan.output_dir / name).exists()]
        if kept:
            left = any((plan.output_dir / "checkpoints").glob("checkpoint-*"))
            fix = "name another folder" + (", or go on with that run: resume=last" if left else "")
            yield Problem("output_dir", f"{plan.output_dir} already holds a run ({kept[0]})", fix)
        return
    yield from _same_run(plan)
    if asked == "last":
        folder = plan.output_dir / "checkpoints"
        if not any(folder.glob("checkpoint-*")):
            fix = "leave resume out" if run.output_dir else "set output_dir to the folder of the run to go on with"
            yield Problem("resume", f"{folder} holds no checkpoint", fix, Exit.MISSING_INPUT)
    elif not (Path(asked) / "trainer_state.json").is_file():
        what = "is no checkpoint of a run" if Path(asked).is_dir() else "does not exist"
        fix = "name a folder such as RUN/checkpoints/checkpoint-50, or write resume=last with output_dir=RUN"
        yield Problem("resume", f"{asked} {what}", fix, Exit.MISSING_INPUT)
    elif _own_checkpoint(plan) and (newest := max(_steps(plan), default=0)) > _step(Path(asked)):
        message = f"{plan.output_dir} has gone on from there, to step {newest}"
        yield Problem("resume", message, "name another output_dir, or go on from there: resume=last")


def _own_checkpoint(plan: Plan) -> bool:
    """Whether `resume` names a checkpoint in the very folder that is written."""
    asked = plan.run.resume.checkpoint
    return asked is not None and Path(asked).resolve().parent == (plan.output_dir / "checkpoints").resolve()


def _steps(plan: Plan) -> list[int]:
    """Those of the run folder's checkpoints."""
    return [_step(folder) for folder in (plan.output_dir / "checkpoints").glob("checkpoint-*")]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


RUN_FILES = ("config.yaml", "run.json", "trained", "metrics.jsonl")
"""What a run leaves in its folder: never written over by another one."""


def _same_run(plan: Plan) -> Iterator[Problem]:
    """A run that goes on in its own folder keeps what its result depends on, and has steps left."""
    record = plan.output_dir / "config.yaml"
    if not (plan.run.resume.checkpoint == "last" or _own_checkpoint(plan)) or not record.is_file():
        return
    for change in [*drift.of_config(plan.run, plan.output_dir, drift.kept_free(plan)), *drift.of_inputs(plan)]:
        if change.key not in plan.run.resume.allow:
            message = f"was {change.before} when the run began, and is {change.now}"
            fix = f"leave it as it was, accept it by 'resume.allow=[{change.key}]', or begin anew: resume=never"
            fix += ", and another output_dir where that is set"
            yield Problem(change.key, message, fix)
    steps = _steps(plan)
    limit = plan.run.trainer.max_steps if plan.run.trainer else -1
    # One that was stopped after its last step has yet to measure, save and export.
    if (
        plan.run.resume.checkpoint == "last"
        and steps
        and 0 < limit <= max(steps)
        and state_of(plan.output_dir) == "done"
    ):
        message = f"is {limit}, and the run has done {max(steps)} steps already"
        yield Problem("trainer.max_steps", message, "give a larger number")


def reward_functions(plan: Plan) -> Iterator[Problem]:
    """The user's rewards are there, and can be called on these rows."""
    if not (plan.trainer and plan.trainer.wants_rewards):
        return
    found = [*_missing_functions(plan)]
    yield from found or rewards.check(plan)


def _missing_functions(plan: Plan) -> Iterator[Problem]:
    for text in plan.run.rewards:
        try:
            import_function(text, "rewards")
        except Refused as refused:
            fix = f"define it there, or name one that is there: rewards=[{text.partition(':')[0]}:FUNCTION]"
            yield from (replace(problem, fix=problem.fix or fix) for problem in refused.problems)


def _context(plan: Plan) -> Iterator[Problem]:
    """No row is longer than what the model was made for, unless its RoPE is scaled."""
    model, trainer = plan.run.model, plan.run.trainer
    assert model is not None
    try:
        own = checkpoint.context_length(model, plan.family)
    except (Refused, KeyError):  # a problem of the checkpoint's own, named by another check
        return
    if own is None:
        return
    if model.rope_scaling or (model.max_length and model.max_length > own):
        try:
            rope.stretched(checkpoint.config_of(model, plan.family).get_text_config(), model)
        except Refused as refused:
            yield from refused.problems
    longest = model.max_length or own
    if trainer is not None and trainer.max_length > longest:
        fix = f"use trainer.max_length={longest}, or model.max_length={trainer.max_length}, which scales RoPE"
        yield Problem(
            "trainer.max_length", f"{trainer.max_length} tokens are more than the model's context of {longest}", fix
        )


def _quantized(plan: Plan) -> Iterator[Problem]:
    assert plan.run.model is not None
    config = (
        None
        if plan.run.model.path is None and plan.run.model.tiny
        else checkpoint.read_config(plan.run.model, plan.family)
    )
    if config and config.get("quantization_config") and plan.run.quantizer:
        method = config["quantization_config"].get("quant_method", "some method")
        yield Problem(
            "quantizer",
            f"the checkpoint is already quantized ({method}), so +quantizer={plan.run.quantizer.name} cannot apply",
            "leave the quantizer out; the checkpoint loads as it is",
        )
