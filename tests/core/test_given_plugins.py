"""What is given as `plugins=` in Python: nothing of it is ignored without a word."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ftcore import hookimpl
from ftcore import hooks as specs
from ftcore.catalog import installed
from ftcore.config import RunConfig
from ftcore.errors import PluginError
from ftcore.manager import Hooks


def family(plugins: Any) -> Any:
    """What the plugins answer."""
    return Hooks.for_run(RunConfig(), installed(), plugins).maybe(specs.ftcore_model_family, config=None)


@hookimpl
def ftcore_model_family() -> str:
    return "mine"


@hookimpl
def model_family() -> str:
    return "never asked"


@hookimpl
def helper() -> None: ...


@hookimpl(specname="ftcore_model_family")
def mine() -> str:
    return "never asked"


class OfInstances:
    @hookimpl
    def ftcore_model_family(self) -> str:
        return "instance"


class OfStatics:
    @staticmethod
    @hookimpl
    def ftcore_model_family() -> str:
        return "static"


class Misnamed(OfInstances):
    @hookimpl
    def ftcore(self) -> None: ...


@pytest.mark.parametrize(
    ("plugins", "message", "fix"),
    [
        ("my_hooks.py", "plugins: takes modules, objects and functions, not the name", "'plugins=[my_hooks.py]'"),
        (Path("my_hooks.py"), "plugins: takes modules, objects and functions", "'plugins=[my_hooks.py]'"),
        (["my_hooks.py"], "plugins[0]: takes modules, objects and functions", "'plugins=[my_hooks.py]'"),
        ([Path("my_hooks.py")], "plugins[0]: takes modules", "name a file or a module in the words of the config"),
        (ftcore_model_family, "plugins: takes a list, and this is a function", "give plugins=[ftcore_model_family]"),
        (specs, "plugins: takes a list, and this is a module", "give plugins=[ftcore.hooks]"),
        (None, "plugins: takes a list, and this is a NoneType", "give plugins=["),
        ([[ftcore_model_family]], "plugins[0] is a list", "put its items into one list"),
        ([model_family], "model_family is marked as a hook and named like none", "name it ftcore_model_family"),
        ([mine], "mine is marked as a hook and named like none", "name it ftcore_model_family"),
        ([helper], "helper is marked as a hook and named like none", "name it after a hook"),
        ([SimpleNamespace(model_family=model_family)], "python/0.SimpleNamespace: model_family is", "name it ftcore_"),
        ([Misnamed()], "python/0.Misnamed: ftcore is marked as a hook", "name it after a hook"),
        (
            [OfInstances],
            "OfInstances is a class, and its ftcore_model_family",
            "give an object: plugins=[OfInstances()]",
        ),
        ([object()], "python/0.object holds no hooks", "put @ftcore.hookimpl above it"),
        ([ModuleType("bare")], "python/0.bare holds no hooks", "name a function after a hook"),
        ([None], "python/0.NoneType holds no hooks", "name a function after a hook"),
        ([lambda: None], "python/0.<lambda> holds no hooks", "name a function after a hook"),
    ],
)
def test_what_would_be_ignored_is_refused(plugins: Any, message: str, fix: str) -> None:
    with pytest.raises(PluginError) as wrong:
        family(plugins)
    first, second = str(wrong.value).split("\n")
    assert message in first
    assert second.startswith("    fix: ")
    assert fix in second


@pytest.mark.parametrize(
    ("plugin", "answer"),
    [(ftcore_model_family, "mine"), (OfInstances(), "instance"), (OfStatics, "static"), (OfStatics(), "static")],
)
def test_functions_objects_and_classes_of_statics_answer(plugin: object, answer: str) -> None:
    assert family([plugin]) == family((plugin,)) == answer


def test_a_hook_may_be_at_hand_by_another_name_as_well() -> None:
    plugin = SimpleNamespace(base=ftcore_model_family, ftcore_model_family=hookimpl(lambda: "lambda"))
    assert family([plugin]) == "lambda"


def test_a_file_with_a_hook_and_one_that_is_misnamed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    marked = "import ftcore\n\n@ftcore.hookimpl\ndef {}(plan):\n    return []\n"
    file.write_text(marked.format("ftcore_check_plan") + marked.format("callbacks"))
    with pytest.raises(PluginError, match=r"callbacks is marked as a hook .*\n +fix: name it ftcore_callbacks"):
        Hooks.for_run(RunConfig(plugins=[str(file)]), installed())
