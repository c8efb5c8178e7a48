"""What core checks in every plan, cheapest first. None of it imports torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ftcore import checkpoint
from ftcore.catalog import installed, nearest
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.manager import import_function, selected_options
from ftcore.rows import iter_rows, local_files
from ftcore.specs import Plan

STREAMED = 1000
"""Rows of a streamed data set that are checked beforehand."""


@hookimpl(trylast=True)
def ftcore_check_plan(plan: Plan) -> Sequence[Problem]:
    """Missing packages, impossible combinations, unknown trainer arguments, missing files, bad rows."""
    assert plan.run.model is not None
    found = [
        *_requirements(plan),
        *_combinations(plan),
        *_trainer_args(plan),
        *_numbers(plan),
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
                yield Problem(f"{option.kind}={option.name}", f"needs {text}, but {have} is installed", f"pip install '{text}'")


def _combinations(plan: Plan) -> Iterator[Problem]:
    run, trainer, form = plan.run, plan.trainer, plan.format
    if trainer and form and form.shape not in trainer.accepts:
        takes = ", ".join(sorted(trainer.accepts))
        name = run.trainer.name if run.trainer else ""
        yield Problem("data", f"{form.name} rows have the shape '{form.shape}', but {name} takes {takes}", f"give rows that {name} can use, or another trainer")
    for role, kernel_set in run.patching.prefer.items():
        offered = {k.name.partition(".")[0] for k in plan.kernels if k.role == role}
        if kernel_set not in offered:
            near = ", ".join(sorted(offered)) or "no selected set"
            yield Problem(f"patching.prefer.{role}", f"'{kernel_set}' offers no kernel for {role}", f"offered by: {near}")
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
            yield Problem(key, "is set by ftcore's own keys", f"see `ftcore plugins trainer/{plan.run.trainer.name}` for the key")
        elif name not in known:
            near = nearest(name, known)
            library = trainer.args.partition(":")[2]
            yield Problem(key, f"{library} has no argument '{name}'", f"did you mean trainer.args.{near}?" if near else "")


def argument_names(text: str) -> set[str]:
    """Field names of `package.module:Class` and its bases, read from the sources without importing them."""
    module, _, name = text.partition(":")
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        return set()
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    homes = {a.asname or a.name: (n.module or "", a.name, n.level) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            for base in node.bases:
                names |= _base_names(ast.unparse(base), module, homes)
    return names


def _base_names(base: str, module: str, homes: dict[str, tuple[str, str, int]]) -> set[str]:
    home, name, level = homes.get(base, (module, base, 0))
    if level:
        home = ".".join([*module.split(".")[:-level], *filter(None, [home])])
    if home == "transformers" and name == "TrainingArguments":
        home = "transformers.training_args"
    return argument_names(f"{home}:{name}")


def _numbers(plan: Plan) -> Iterator[Problem]:
    trainer = plan.run.trainer
    if trainer is None:
        return
    for key in ("learning_rate", "global_batch", "max_length", "logging_steps"):
        if getattr(trainer, key) <= 0:
            yield Problem(f"trainer.{key}", f"is {getattr(trainer, key)}", "give a number above 0")
    if trainer.micro_batch < 0 or (trainer.micro_batch and trainer.global_batch % trainer.micro_batch):
        yield Problem(
            "trainer.micro_batch",
            f"{trainer.micro_batch} does not divide trainer.global_batch={trainer.global_batch}",
            "choose a divisor, so that every step has the same number of rows",
        )
    if trainer.max_steps <= 0 and trainer.epochs <= 0:
        yield Problem("trainer.epochs", f"is {trainer.epochs} and trainer.max_steps is not set", "set one of them above 0")
    if plan.run.data and plan.run.data.streaming and trainer.max_steps <= 0:
        yield Problem("data.streaming", "a streamed data set has no known length", "set trainer.max_steps")


def _quantized(plan: Plan) -> Iterator[Problem]:
    assert plan.run.model is not None
    config = None if plan.run.model.path is None and plan.run.model.tiny else checkpoint.read_config(plan.run.model, plan.family)
    if config and config.get("quantization_config") and plan.run.quantizer:
        method = config["quantization_config"].get("quant_method", "some method")
        yield Problem(
            "quantizer",
            f"the checkpoint is already quantized ({method}), so +quantizer={plan.run.quantizer.name} cannot apply",
            "leave the quantizer out; the checkpoint loads as it is",
        )


def _data(plan: Plan) -> Iterator[Problem]:
    if plan.format is None or plan.run.data is None or plan.trainer is None:
        return
    check = import_function(plan.format.check, "data")
    for path in (plan.run.data.path, plan.run.data.eval_path):
        try:
            files = local_files(path) if path else []
            for file in files or ():
                yield from _rows(file, check, STREAMED if plan.run.data.streaming else None)
        except Refused as refused:
            yield from refused.problems


def _rows(file: Path, check, limit: int | None) -> Iterator[Problem]:  # type: ignore[no-untyped-def]
    empty = True
    for place, row in islice(iter_rows(file), limit):
        empty = False
        if reason := check(row):
            yield Problem(place, reason, code=Exit.DATA)
    if empty:
        yield Problem(str(file), "holds no rows", code=Exit.DATA)
