"""What every plugin keeps to, whatever its kind."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftcore.catalog import Catalog, Option, field_help, installed
from ftcore.config import KINDS, RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "triton")
"""Packages that a plugin module must leave alone until a hook is called: they take seconds to import."""
CEILING = 0.25
"""Seconds of processor time that importing a plugin may take; a usual one takes 0.05."""

IMPORT = """
import importlib, json, os, sys, time
environment, path = dict(os.environ), list(sys.path)
start = time.process_time()
importlib.import_module(sys.argv[1])
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds,
    "heavy": [name for name in sys.argv[2].split(",") if name in sys.modules],
    "environment": environment != dict(os.environ),
    "path": path != sys.path,
}))
"""


class PluginContract:
    """Base of all contracts; on its own it fits any plugin."""

    plugin: ClassVar[str] = ""
    """`kind/name`, as `ftcore plugins` lists it."""
    settings: ClassVar[Sequence[str]] = ()
    """Overrides that the plugin needs, such as `extra.jsonl.path=all.jsonl`."""

    def option(self) -> Option:
        """The installed plugin."""
        kind, _, name = self.plugin.partition("/")
        assert kind in KINDS, f"plugin = '{self.plugin}' does not start with a kind: {', '.join(KINDS)}"
        return installed().find(kind, name)

    def module(self) -> ModuleType:
        """The plugin's module."""
        return self.option().load()

    def selected(self) -> list[str]:
        """Overrides that select the plugin with what it needs."""
        from ftcore.testing.runs import selecting

        kind, _, name = self.plugin.partition("/")
        return [selecting(kind, name), *self.settings]

    def test_import_is_light_and_changes_nothing(self) -> None:
        """Importing the module pulls in nothing heavy, takes no time, and changes neither environment nor path."""
        found: dict[str, Any] = {}
        for _ in range(3):  # a busy machine may be slow once, not three times
            found = _imported(self.option().module)
            if found["seconds"] < CEILING:
                break
        assert found["heavy"] == [], "import these inside the hooks"
        assert not found["environment"], "importing the plugin changes os.environ"
        assert not found["path"], "importing the plugin changes sys.path"
        assert found["seconds"] < CEILING, "importing the plugin is slow"

    def test_docstring_says_what_it_is(self) -> None:
        """The first line of the module's docstring is what `ftcore plugins` shows."""
        lines = (self.module().__doc__ or "").splitlines()
        assert lines, f"{self.option().module} has no docstring"
        assert lines[0].strip(), f"the docstring of {self.option().module} starts with an empty line"
        assert self.option().summary() == lines[0]

    def test_config_is_typed_and_documented(self) -> None:
        """`Config` is a dataclass under its kind's base that OmegaConf takes, with a help string for each own field."""
        from omegaconf import OmegaConf

        cls = self.option().config_class()
        assert is_dataclass(cls)
        assert issubclass(cls, KINDS[self.option().kind])
        config = cls(name=self.option().name)
        assert OmegaConf.to_object(OmegaConf.structured(config)) == config
        helps = field_help(cls)
        bare = [name for name in inspect.get_annotations(cls) if not helps.get(name)]
        assert not bare, f"put a string under these fields of Config: {', '.join(bare)}"

    def test_hooks_match_their_specs(self) -> None:
        """Every hook exists, takes no unknown argument, and the plugin answers at least one."""
        from ftcore.manager import Hooks

        hooks = Hooks.for_run(RunConfig(), Catalog([]), [self.module()])
        assert hooks.infos()[-1].hooks, f"{self.option().module} implements no hook"

    def test_no_hook_pushes_itself_forward(self) -> None:
        """`tryfirst` would take away the user's last word."""
        module = self.module()
        pushing = [
            n
            for n in dir(module)
            if n.startswith("ftcore_") and getattr(getattr(module, n), "ftcore_impl", {}).get("tryfirst")
        ]
        assert not pushing

    def test_requirements_can_be_read(self) -> None:
        """`REQUIRES` is a tuple of requirements, as pip takes them."""
        from packaging.requirements import Requirement

        requires = getattr(self.module(), "REQUIRES", ())
        assert isinstance(requires, tuple), "REQUIRES is a tuple; a comma is missing when it has one item"
        for text in requires:
            Requirement(text)

    def test_selects_what_is_installed(self) -> None:
        """`SELECTS` names options of other kinds that are there."""
        for kind, name in getattr(self.module(), "SELECTS", {}).items():
            assert kind != self.option().kind
            installed().find(kind, name)


def _imported(module: str) -> dict[str, Any]:
    command = [sys.executable, "-c", IMPORT, module, ",".join(HEAVY)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        pytest.fail(f"{module} does not import: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
