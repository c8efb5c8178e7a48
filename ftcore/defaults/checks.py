"""What core checks in every plan, cheapest first. None of it imports torch."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ftcore import checkpoint
from ftcore.catalog import installed, nearest
from ftcore.config import DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.manager import import_function, selected_options
from ftcore.rows import Row, hub_rows, iter_rows, local_files, row_problem
from ftcore.specs import Plan

STREAMED = 1000
"""Rows of a streamed data set that are checked beforehand."""
FROM_HUB = 100
"""Rows of a data set on the hub that are checked beforehand."""


@hookimpl(trylast=True)
def ftcore_check_plan(plan: Plan) -> Sequence[Problem]:
    """Missing packages, impossible combinations, unknown trainer arguments, missing files, bad rows."""
    assert plan.run.model is not None
    found = [
        *_requirements(plan),
        *_selection(plan),
        *_combinations(plan),
        *_trainer_args(plan),
        *_numbers(plan),
        *_evaluation(plan),
        *_folders(plan),
        *_rewards(plan),
        *checkpoint.problems(plan.run.model, plan.family),
        *_quantized(plan),
    ]
    # Rows are read last and only for a plan that is sound otherwise: it may take a while.
    return found or [*_data(plan)]


def _requirements(plan: Plan) -> Iterator[Problem]:
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
        message = f"{form.name} rows have the shape '{form.shape}', but {name} takes {takes}"
        yield Problem("data", message, f"{fix}, or select another trainer")
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
    if run.memory.value == "offload":
        yield Problem("memory", "`offload` is not built yet", "use memory=least for the smallest footprint")
    if run.model and run.model.new_tokens:
        yield Problem("model.new_tokens", "adding tokens is not built yet", "leave it empty")


def _trainer_args(plan: Plan) -> Iterator[Problem]:
    trainer = plan.trainer
    if not (trainer and trainer.args and plan.run.trainer):
        return
    known = argument_names(trainer.args)
    for name in plan.run.trainer.args:
        key = f"trainer.args.{name}"
        if name in trainer.owned:
            fix = f"write trainer.{name}" if hasattr(plan.run.trainer, name) else "leave it out"
            yield Problem(
                key,
                "is set by ftcore's own keys",
                f"{fix}; `ftcore plugins trainer/{plan.run.trainer.name}` lists them",
            )
        elif name not in known:
            near = nearest(name, known)
            library = trainer.args.partition(":")[2]
            own = (
                f"did you mean trainer.{name}?"
                if hasattr(plan.run.trainer, name)
                else f"leave it out, or see the arguments of {library}"
            )
            yield Problem(
                key, f"{library} has no argument '{name}'", f"did you mean trainer.args.{near}?" if near else own
            )


def argument_names(text: str) -> set[str]:
    """Field names of `package.module:Class` and its bases, read from the sources without importing them."""
    node, tree = _class_source(text)
    if node is None:
        return set()
    homes = {
        a.asname or a.name: (n.module or "", a.name, n.level)
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    names = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for base in node.bases:
        names |= _base_names(ast.unparse(base), text.partition(":")[0], homes)
    return names


def _class_source(text: str) -> tuple[ast.ClassDef | None, ast.Module]:
    """The class `package.module:Class` and its module as they are written; nothing is imported."""
    module, _, name = text.partition(":")
    spec = importlib.util.find_spec(module.partition(".")[0])
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]) if spec and spec.origin else Path(module)
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")
    found = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(found, None), tree


def _base_names(base: str, module: str, homes: dict[str, tuple[str, str, int]]) -> set[str]:
    home, name, level = homes.get(base, (module, base, 0))
    if level:
        home = ".".join([*module.split(".")[:-level], *filter(None, [home])])
    if home == "transformers" and name == "TrainingArguments":
        home = "transformers.training_args"
    return argument_names(f"{home}:{name}")


def _numbers(plan: Plan) -> Iterator[Problem]:
    run, trainer = plan.run, plan.run.trainer
    yield from _range("sampling", run.sampling, above_0=("max_new_tokens",), from_0=("temperature",))
    if not 0 < run.sampling.top_p <= 1:
        yield Problem("sampling.top_p", f"is {run.sampling.top_p}", "give a number above 0 and up to 1")
    if run.model and run.model.max_length is not None:
        yield from _range("model", run.model, above_0=("max_length",))
    if trainer is None:
        return
    yield from _range("trainer", trainer, ABOVE_0, FROM_0)
    if trainer.micro_batch > 0 and trainer.global_batch > 0 and trainer.global_batch % trainer.micro_batch:
        divisors = [str(n) for n in range(1, trainer.global_batch + 1) if trainer.global_batch % n == 0]
        message = f"{trainer.micro_batch} does not divide trainer.global_batch={trainer.global_batch}"
        yield Problem(
            "trainer.micro_batch", message, f"every step has the same number of rows: use {', '.join(divisors[-6:])}"
        )
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        yield Problem(
            "trainer.max_steps", f"is {trainer.max_steps}", "give a number above 0, or -1 to let trainer.epochs decide"
        )
    if trainer.max_steps == -1 and not 0 < trainer.epochs < math.inf:
        yield Problem(
            "trainer.epochs", f"is {trainer.epochs} and trainer.max_steps is not set", "set one of them above 0"
        )
    known = enum_values("transformers.trainer_utils:SchedulerType")
    if known and trainer.schedule not in known:
        near = nearest(trainer.schedule, known)
        fix = f"did you mean trainer.schedule={near}?" if near else f"schedules: {', '.join(known)}"
        yield Problem("trainer.schedule", f"there is no schedule '{trainer.schedule}'", fix)


ABOVE_0 = ("learning_rate", "global_batch", "max_length", "logging_steps")
FROM_0 = (
    "micro_batch",
    "weight_decay",
    "warmup",
    "max_grad_norm",
    "eval_steps",
    "save_steps",
    "early_stopping",
    "seed",
)


def _range(path: str, config: object, above_0: Iterable[str] = (), from_0: Iterable[str] = ()) -> Iterator[Problem]:
    for key in above_0:
        if not 0 < getattr(config, key) < math.inf:
            yield Problem(f"{path}.{key}", f"is {getattr(config, key)}", "give a number above 0")
    for key in from_0:
        if not 0 <= getattr(config, key) < math.inf:
            yield Problem(f"{path}.{key}", f"is {getattr(config, key)}", "give 0 or a number above it")


def enum_values(text: str) -> list[str]:
    """Values of the enum `package.module:Class`, read from its source without importing it."""
    node = _class_source(text)[0]
    body = node.body if node else []
    return [str(n.value.value) for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]


def _evaluation(plan: Plan) -> Iterator[Problem]:
    """Held-out rows are there where something asks for them, and rows are left to train on."""
    data, form, trainer = plan.run.data, plan.format, plan.run.trainer
    if data is None or form is None or trainer is None:
        return
    offer = "set data.eval_path, or data.eval_size=0.1"
    if not (data.eval_path or data.eval_size or (data.path is None and form.sample_eval)):
        for key in ("eval_steps", "early_stopping"):
            if getattr(trainer, key) > 0:
                yield Problem(f"trainer.{key}", "there are no held-out rows to evaluate", offer)
    elif trainer.early_stopping > 0 and not trainer.eval_steps:
        yield Problem(
            "trainer.early_stopping",
            "needs evaluations while it trains",
            "set trainer.eval_steps, such as trainer.eval_steps=50",
        )
    if not 0 <= data.eval_size < math.inf:
        yield Problem("data.eval_size", f"is {data.eval_size}", "give a fraction below 1, or a number of rows")
    if data.streaming and trainer.max_steps < 1:
        yield Problem("data.streaming", "a streamed data set has no known length", "set trainer.max_steps")
    if data.streaming and 0 < data.eval_size < 1 and not data.eval_path:
        yield Problem(
            "data.eval_size",
            "a streamed data set has no known length to take a part of",
            "give a number of rows, or data.eval_path",
        )


def _folders(plan: Plan) -> Iterator[Problem]:
    """The run folder can be made, and what `resume` names is a checkpoint."""
    run, there = plan.run, plan.output_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield Problem("output_dir", f"{there} is a file", "name a folder")
    if run.trainer is None or run.resume is None:
        return
    if run.resume == "last":
        folder = plan.output_dir / "checkpoints"
        if not any(folder.glob("checkpoint-*")):
            fix = "leave resume out" if run.output_dir else "set output_dir to the folder of the run to go on with"
            yield Problem("resume", f"{folder} holds no checkpoint", fix, Exit.MISSING_INPUT)
    elif not (Path(run.resume) / "trainer_state.json").is_file():
        what = "is no checkpoint of a run" if Path(run.resume).is_dir() else "does not exist"
        fix = "name a folder such as RUN/checkpoints/checkpoint-50, or write resume=last with output_dir=RUN"
        yield Problem("resume", f"{run.resume} {what}", fix, Exit.MISSING_INPUT)


def _rewards(plan: Plan) -> Iterator[Problem]:
    for text in plan.run.rewards if plan.trainer and plan.trainer.wants_rewards else ():
        try:
            import_function(text, "rewards")
        except Refused as refused:
            fix = f"define it there, or name one that is there: rewards=[{text.partition(':')[0]}:FUNCTION]"
            yield from (replace(problem, fix=problem.fix or fix) for problem in refused.problems)


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


def _data(plan: Plan) -> Iterator[Problem]:
    form, data = plan.format, plan.run.data
    if form is None or data is None or plan.trainer is None:
        return
    check = import_function(form.check, "data")
    for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        try:
            files = local_files(path, key) if path else []
            if files is None:
                assert path is not None
                yield from _rows(islice(hub_rows(path, data.split, key), FROM_HUB), check, path)
            elif files and data.split != DataConfig().split:
                yield Problem("data.split", f"the local file {path} has no splits", "leave data.split out")
            for file in files or ():
                yield from _rows(islice(iter_rows(file), STREAMED if data.streaming else None), check, str(file))
        except Refused as refused:
            yield from refused.problems
    if data.eval_size and not (data.eval_path or data.streaming):
        yield from _split(data.eval_size, data.path or form.sample)


def _rows(rows: Iterable[tuple[str, Row]], check: Callable[[Row], str | None], source: str) -> Iterator[Problem]:
    """One problem for each thing that is wrong, at the first row that has it."""
    empty = True
    bad: dict[str, list[str]] = {}
    for place, row in rows:
        empty = False
        if reason := check(row):
            bad.setdefault(reason, []).append(place)
    for reason, places in bad.items():
        yield row_problem(places[0], reason, f" (the same in {len(places) - 1} more rows)" if len(places) > 1 else "")
    if empty:
        yield Problem(source, "holds no rows", "give a file with at least one row", Exit.DATA)


def _split(size: float, path: str) -> Iterator[Problem]:
    files = local_files(path)
    if files is None:
        return
    rows = sum(1 for file in files for _ in iter_rows(file))
    held_out = math.ceil(rows * size) if size < 1 else int(size)
    if held_out >= rows:
        message = f"holds out {held_out} of {rows} rows, which leaves none to train on"
        yield Problem("data.eval_size", message, "give a smaller number, or set data.eval_path")
