"""Write docs/reference/{hooks,options,cli,models}.md from the code; `docs/generate.py --check` says what is stale."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields
from enum import Enum
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ftcore import cli, hooks, pipeline
from ftcore.catalog import Option, field_help, installed
from ftcore.config import (
    DEFAULTED,
    KINDS,
    MANY,
    PatchingConfig,
    PreviewConfig,
    ResumeConfig,
    RunConfig,
    SamplingConfig,
    ScoringConfig,
)
from ftcore.coverage import TRAITS, Row, coverage, family_of
from ftcore.defaults import modules as core_modules
from ftcore.defaults.plan import PlanMaker
from ftcore.errors import Exit
from ftcore.manager import spec_names
from ftcore_kernels.decoding.families import images, way

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from ftcore.specs import ModelFamily

REFERENCE = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/generate.py. Do not edit. -->\n"
SECTIONS = {
    "scoring": ScoringConfig,
    "patching": PatchingConfig,
    "sampling": SamplingConfig,
    "preview": PreviewConfig,
    "resume": ResumeConfig,
}
EXITS = {
    Exit.DONE: "done",
    Exit.CONFIG: "the configuration, or a plugin, is at fault",
    Exit.DATA: "a row of the data is bad",
    Exit.MISSING_INPUT: "a file, folder, checkpoint or data set is not there",
    Exit.NUMERIC: "the numbers went wrong",
    Exit.BUSY: "something else holds what the run needs",
    Exit.IO: "reading or writing failed",
    Exit.PREEMPTED: "stopped from outside",
}


def main(argv: list[str]) -> int:
    """Write the pages, or check them."""
    pages = {"hooks.md": hooks_page(), "options.md": options_page(), "cli.md": cli_page(), "models.md": models_page()}
    stale = [name for name, text in pages.items() if not _same(REFERENCE / name, text)]
    if "--check" in argv:
        for name in stale:
            print(f"docs/reference/{name} is out of date; run: python docs/generate.py")
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for name in stale:
        (REFERENCE / name).write_text(pages[name], encoding="utf-8")
        print(f"wrote docs/reference/{name}")
    return 0


def own_options(kind: str) -> list[Option]:
    """The options that ftcore itself brings: what else is installed here must not change the pages."""
    return [option for option in installed().options(kind) if option.dist == "ftcore"]


# ---- hooks ----------------------------------------------------------------------------------------------------------


def hooks_page() -> str:
    """Every hook in call order, with who answers it, and the code that calls them."""
    doc = inspect.cleandoc(hooks.__doc__ or "").replace(":data:`hookimpl`", "`hookimpl`")
    doc = doc.replace(":func:`ftcore.run`", "`ftcore.run`").replace("``", "`")
    intro = doc.partition("\n\n")[2]
    parts = [
        NOTICE,
        "# Hooks\n",
        "Every stage of a run is a hook. This is the whole list, by subject. A run reads and formats its data before "
        "it loads the model; the order is in [the run that calls them](#the-run-that-calls-them).\n",
        intro + "\n",
        *_hooks(),
        "## The run that calls them\n",
        "`ftcore/pipeline.py`, the functions `prepare`, `load` and `run`:\n",
        *(f"```{{.python .listing}}\n{_source(name)}\n```\n" for name in ("prepare", "load", "run")),
    ]
    return "\n".join(parts)


def _hooks() -> Iterator[str]:
    answers = _answers()
    sections = _sections()
    for name in spec_names():
        if name in sections:
            title, _, rest = sections[name].partition(": ")
            yield f"## {title}\n"
            if rest:
                yield f"{rest[0].upper()}{rest[1:]}.\n"
        spec = getattr(hooks, name)
        first = bool((spec.ftcore_spec or {}).get("firstresult"))
        yield f"### {name}\n"
        yield f"```{{.python .listing}}\n{_signature(name)}\n```\n"
        yield f"**{'first' if first else 'all'}.** {inspect.cleandoc(spec.__doc__ or '')}\n"
        core, plugins = answers[name]
        shipped = ", ".join(plugins) or "none shipped"
        yield f"Core's own answer: {', '.join(core) or 'none'}. Plugins that answer: {shipped}.\n"


def _answers() -> dict[str, tuple[list[str], list[str]]]:
    found: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in spec_names()}
    for module in core_modules():
        for name in _implemented(module):
            doc = inspect.cleandoc(getattr(module, name).__doc__ or "").splitlines()
            found[name][0].append(f"`{module.__name__}`" + (f" ({doc[0].rstrip('.')})" if doc else ""))
    for name in _implemented(PlanMaker):
        found[name][0].append(f"`{PlanMaker.__module__}`")
    for kind in KINDS:
        for option in own_options(kind):
            for name in _implemented(option.load()):
                found[name][1].append(f"`{kind}/{option.name}`")
    return found


def _implemented(plugin: Any) -> list[str]:
    return [name for name in spec_names() if callable(getattr(plugin, name, None))]


def _tree(module: ModuleType) -> tuple[str, ast.Module]:
    assert module.__file__
    text = Path(module.__file__).read_text(encoding="utf-8")
    return text, ast.parse(text)


def _signature(name: str) -> str:
    _, tree = _tree(hooks)
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = [ast.unparse(a) for a in node.args.args]
    assert node.returns is not None
    one_line = f"def {name}({', '.join(arguments)}) -> {ast.unparse(node.returns)}"
    if len(one_line) <= 100:
        return one_line
    inner = "".join(f"    {argument},\n" for argument in arguments)
    return f"def {name}(\n{inner}) -> {ast.unparse(node.returns)}"


def _sections() -> dict[str, str]:
    """First hook of a section of hooks.py to the section's title: the comment in its banner."""
    lines = Path(hooks.__file__).read_text(encoding="utf-8").splitlines()
    found, title = {}, ""
    for before, line in pairwise(lines):
        if before.startswith("# ----") and line.startswith("# ") and not line.startswith("# ----"):
            title = line.removeprefix("# ").rstrip(".")
        if line.startswith(f"def {hooks.PREFIX}") and title:
            found[line.removeprefix("def ").partition("(")[0]] = title
            title = ""
    return found


def _source(name: str) -> str:
    text, tree = _tree(pipeline)
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    source = ast.get_source_segment(text, node)
    assert source
    return source


# ---- options --------------------------------------------------------------------------------------------------------


def options_page() -> str:
    """Every key of every option, from the dataclasses."""
    parts = [
        NOTICE,
        "# Options and keys\n",
        "`ftcore plugins` shows the options and their keys on the command line, with what third parties have "
        "installed; the keys of a run are only here:",
        "`ftcore plugins trainer/sft`.\n",
        "A kind is selected with `+kind=option`, or with `kind=option` where it has a default.",
        "Every other key is written `key=value`. A list goes in quotes: `'rewards=[my_rewards.py:score]'`.\n",
        "## Keys of a run\n",
        _table("", RunConfig, [f for f in fields(RunConfig) if f.name not in {*KINDS, *SECTIONS}]),
    ]
    for name, cls in SECTIONS.items():
        parts += [f"### {name}\n", f"{_doc(cls)}\n", _table(f"{name}.", cls, list(fields(cls)))]
    for kind, base in KINDS.items():
        parts += _kind(kind, base)
    return "\n".join(parts)


def _kind(kind: str, base: type[Any]) -> Iterator[str]:
    many = kind in MANY
    form = f"{kind}=[NAME,...]" if many else f"{kind}=NAME"
    form = form if kind in DEFAULTED else f"+{form}"
    yield f"## {kind}\n"
    yield f"{field_help(RunConfig)[kind]} Selected with `{form}`{'; several at once' if many else ''}.\n"
    shared = [f for f in fields(base) if f.name != "name"]
    prefix = f"{kind}.NAME." if many else f"{kind}."
    if shared:
        yield "Keys of every option of this kind:\n"
        yield _table(prefix, base, shared)
    for option in own_options(kind):
        yield f"### {kind}/{option.name}\n"
        module, cls = option.load(), option.config_class()
        yield f"{_doc(module)}\n"
        if requires := getattr(module, "REQUIRES", ()):
            yield f"Needs {', '.join(f'`{need}`' for need in requires)}.\n"
        own = [f for f in fields(cls) if f.name != "name" and not _same_field(f, cls, base)]
        if own:
            yield _table(f"{kind}.{option.name}." if many else f"{kind}.", cls, own)
        else:
            yield "No keys of its own.\n"


def _same_field(field: Field[Any], cls: type[Any], base: type[Any]) -> bool:
    inherited = {f.name: f for f in fields(base)}.get(field.name)
    if inherited is None:
        return False
    return _default(field) == _default(inherited) and field_help(cls)[field.name] == field_help(base)[field.name]


def _table(prefix: str, cls: type[Any], rows: list[Field[Any]]) -> str:
    helps, hints = field_help(cls), get_type_hints(cls)
    lines = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for field in rows:
        kind = _type(field, hints[field.name])
        lines.append(f"| `{prefix}{field.name}` | {kind} | `{_default(field)}` | {_cell(helps[field.name])} |")
    return "\n".join(lines) + "\n"


def _type(field: Field[Any], hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return _cell(text.replace(" | None", ", or null"))


def _default(field: Field[Any]) -> str:
    value = field.default
    if value is MISSING:
        value = field.default_factory() if field.default_factory is not MISSING else None
    value = getattr(value, "value", value)
    if value is None or value == "":
        return "null" if value is None else '""'
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _doc(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


# ---- command line ---------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Tasks, grammar and exit codes."""
    used = {Exit.DONE, Exit.CONFIG, *_used_exits()}
    defaulted = ", ".join(f"`{kind}`" for kind in sorted(DEFAULTED))
    parts = [
        NOTICE,
        "# Command line\n",
        "`ftcore [TASK] key=value ...`\n",
        "The task is the first word that starts with a letter and holds no `=`; without one it is `train`.\n",
        "## Tasks\n",
        *_tasks(),
        "## Grammar\n",
        "The words are [Hydra](https://hydra.cc)'s overrides. Three things cover nearly all of it:\n",
        "* `+kind=option` selects where nothing is selected yet: `+model=qwen3`, `'+export=[adapter,safetensors]'`.",
        f"* `kind=option` replaces a default ({defaulted}): `adapter=full`, `'kernels=[]'`.",
        "* `key=value` sets a key: `trainer.max_steps=50`. An unknown key is refused, and the nearest one named.\n",
        "Quote what your shell or Hydra's grammar would read otherwise: `'rewards=[my.py:score]'`,",
        "`'sampling.system=\"Answer in one line.\"'`. An error about the grammar shows the quoted form.\n",
        "`-m` runs a sweep: `ftcore -m ... trainer.learning_rate=1e-4,1e-3`.",
        "`--config-dir FOLDER` adds YAML of your own.\n",
        "## Exit codes\n",
        "| code | meaning |",
        "|---|---|",
        *(f"| {int(code)} | {EXITS[code]}{'' if code in used else ' (not used yet)'} |" for code in Exit),
        "",
    ]
    return "\n".join(parts)


def _tasks() -> Iterator[str]:
    for task, summary in cli.TASKS.items():
        yield f"### ftcore {task}\n"
        path = Path(cli.__file__).parent / "tasks" / f"{task}.py"
        doc = _doc(import_module(f"ftcore.tasks.{task}")) if path.is_file() else f"{summary}."
        yield f"{doc}\n"
        if task in cli.PLAIN:
            yield "Takes ordinary arguments; `-h` shows them.\n"


def _used_exits() -> set[Exit]:
    """Exit codes that some code of ftcore's own ends with."""
    sources = [
        file.read_text(encoding="utf-8")
        for root in ("ftcore", "plugins", "kernels")
        for file in (REFERENCE.parent.parent / root).rglob("*.py")
        if file.name != "errors.py"
    ]
    return {code for code in Exit if any(f"Exit.{code.name}" in text for text in sources)}


# ---- models ---------------------------------------------------------------------------------------------------------


def models_page() -> str:
    """Every family with the kernels that serve it, and why others do not."""
    families = [(option, family) for option in own_options("model") if (family := family_of(option))]
    covered = {option.name: coverage(family, own_options("kernels")) for option, family in families}
    roles = list(dict.fromkeys(row.role.name for rows in covered.values() for row in rows))
    traits = sorted({trait for _, family in families for role in family.roles for trait in role.traits})
    parts = [
        NOTICE,
        "# Models\n",
        "`ftcore plugins model/NAME` shows the same for one family, with what third parties have installed.",
        "A kernel is used where its maths is the model's own; elsewhere the trait that it does not know is named.",
        "Where a `decoder_layer` kernel takes a layer, it does the work of those for the roles inside.\n",
        f"| family | {' | '.join(f'`{role}`' for role in roles)} |",
        f"|---|{'---|' * len(roles)}",
        *(f"| `{name}` | {' | '.join(_claim(rows, role) for role in roles)} |" for name, rows in covered.items()),
        "\n`yes`: in Triton and in PyTorch. `no set`: no kernel set has one. `-`: no such part.\n",
        "| trait | what it means |",
        "|---|---|",
        *(f"| `{trait}` | {_cell(TRAITS[trait])} |" for trait in traits),
        "",
    ]
    for option, family in families:
        parts += _family(option, family)
    return "\n".join(parts)


def _claim(rows: list[Row], role: str) -> str:
    row = next((row for row in rows if row.role.name == role), None)
    if row is None:
        return "-"
    if row.sets:
        return "yes" if set(row.sets) == {"reference", "triton"} else ", ".join(row.sets)
    return ", ".join(f"`{trait}`" for trait in sorted(row.uncovered)) or "no set"


def _family(option: Option, family: ModelFamily) -> Iterator[str]:
    yield f"## {option.name}\n"
    yield f"{_doc(option.load())}\n"
    yield f"* Checkpoints of type {', '.join(f'`{kind}`' for kind in family.model_types)}:"
    yield f"  {', '.join(f'`{name}`' for name in family.checkpoints)}."
    yield f"* LoRA adapts {', '.join(f'`{name}`' for name in family.lora_targets + family.lora_parameters)}."
    if any("experts." in name for name in family.lora_parameters):
        yield "* A quantizer leaves the experts as they are: they are parameters, not linear layers."
    if family.shapes:
        yield f"* `model.shape`: {', '.join(f'`{name}`' for name in family.shapes)}."
    if (how := way(family)) is not None:
        shown = "; prompts with images too" if images(family) else ""
        yield f"* `generator=fast`: {how}{shown}."
    for kind, keys in family.sampling.items():
        yield f"* Recommended, {kind}: {', '.join(f'{key} {value}' for key, value in keys.items())}."
    for limit in family.limits:
        yield f"* Refused: `{limit.key}`; {limit.reason}."
    yield ""


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
