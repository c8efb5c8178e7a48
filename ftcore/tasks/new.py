"""`ftcore new KIND/NAME`: write a plugin package that works as it stands, with its own tests, to start from."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
from importlib.resources import files
from pathlib import Path
from string import Template

from ftcore.catalog import installed, nearest
from ftcore.config import KINDS
from ftcore.errors import Problem, Refused
from ftcore.paths import whole_folder
from ftcore.report import heading, table

TEMPLATES = files("ftcore") / "scaffold"
RUN = "ftcore +model=llama model.tiny=true +trainer=sft trainer.max_steps=3"
TRY = {
    "model": "ftcore +model={name} model.tiny=true +trainer=sft trainer.max_steps=3",
    "quantizer": f"{RUN} +quantizer={{name}}",
    "kernels": f"{RUN} kernels=[{{name}}]",
    "adapter": f"{RUN} adapter={{name}}",
    "data": f"ftcore preview {RUN.removeprefix('ftcore ')} data={{name}}",
    "trainer": "ftcore +model=llama model.tiny=true +trainer={name} trainer.max_steps=3",
    "generator": "ftcore +model=llama model.tiny=true +trainer=grpo trainer.max_steps=1 generator={name}",
    "reward": "ftcore +model=llama model.tiny=true +trainer=grpo trainer.max_steps=1 '+reward=[{name}]'",
    "export": f"{RUN} '+export=[{{name}}]'",
    "extra": f"{RUN} '+extra=[{{name}}]'",
}
"""Kind to a command that shows the new plugin at work without a download."""


def main(argv: list[str]) -> int:
    """Write the package and say what to do next."""
    parser = argparse.ArgumentParser("ftcore new", description="Write a plugin package to start from.")
    parser.add_argument("what", help="KIND/NAME, such as export/numpy; kinds: " + ", ".join(KINDS))
    parser.add_argument("--into", default=".", metavar="DIR", help="folder to write the package folder into")
    arguments = parser.parse_args(argv)
    kind, name = _checked(arguments.what)
    folder = write_package(kind, name, Path(arguments.into))
    heading("Written")
    table((path.relative_to(folder.parent),) for path in sorted(folder.rglob("*")) if path.is_file())
    heading("Next")
    table([(f"cd {folder}", ""), ("pip install -e '.[test]'", ""), ("pytest", "its contract"), (_try(kind, name), "")])
    return 0


def write_package(kind: str, name: str, into: Path) -> Path:
    """Write `ftcore-NAME/` into a folder; returns its path.

    Raises Refused when something of that name is there already.
    """
    folder = into / f"ftcore-{name}"
    if folder.exists():
        raise Refused(
            Problem(
                f"{kind}/{name}", f"{folder} exists already", "choose another name, or another folder with --into DIR"
            )
        )
    words = {
        "kind": kind,
        "name": name,
        "test": _class_name(name),
        "contract": f"{kind.capitalize()}Contract",
        "command": _try(kind, name),
    }
    with whole_folder(folder) as work:
        for target, template in _templates(kind, name).items():
            path = work / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(_read(template)).substitute(words), encoding="utf-8")
    return folder


def _templates(kind: str, name: str) -> dict[str, str]:
    """File of the package to its template."""
    package = f"ftcore_{name}"
    test = f"kinds/{kind}.test.py.txt" if _exists(f"kinds/{kind}.test.py.txt") else "test_plugin.py.txt"
    found = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{package}/__init__.py": f"kinds/{kind}.py.txt",
        f"{package}/py.typed": "py.typed.txt",
        "tests/test_plugin.py": test,
    }
    if _exists(f"kinds/{kind}.jsonl.txt"):
        found[f"{package}/sample.jsonl"] = f"kinds/{kind}.jsonl.txt"
    return found


def _exists(template: str) -> bool:
    return TEMPLATES.joinpath(*template.split("/")).is_file()


def _read(template: str) -> str:
    return TEMPLATES.joinpath(*template.split("/")).read_text(encoding="utf-8")


def _checked(what: str) -> tuple[str, str]:
    """Kind and name, both fit to use."""
    kind, slash, name = what.partition("/")
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        raise Refused(
            Problem(
                what,
                f"'{kind}' is no kind of plugin",
                f"did you mean {near}/{name or 'NAME'}?" if near else f"kinds: {', '.join(KINDS)}",
            )
        )
    if not slash or not name:
        raise Refused(Problem(what, "names no plugin", f"write ftcore new {kind}/NAME"))
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii() or name != name.lower():
        message = f"'{name}' cannot be the name of a Python package"
        raise Refused(Problem(what, message, "use lower-case letters, digits and underscores, starting with a letter"))
    if taken := [option.origin for option in installed().options(kind) if option.name == name]:
        raise Refused(Problem(what, f"the name is taken by {taken[0]}", "choose another name"))
    if importlib.util.find_spec(f"ftcore_{name}") is not None:
        raise Refused(Problem(what, f"a package ftcore_{name} is installed already", "choose another name"))
    return kind, name


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _try(kind: str, name: str) -> str:
    return TRY[kind].format(name=name)
