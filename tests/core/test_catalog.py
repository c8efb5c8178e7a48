"""The catalog: lazy, complete, and clear about names that two packages claim."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ftcore.catalog import Catalog, Option, field_help, installed
from ftcore.config import KINDS, RunConfig
from ftcore.errors import PluginError, Refused

ROOT = Path(__file__).parents[2]


def test_installed_entry_points_are_those_of_pyproject() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for kind in KINDS:
        declared = groups.get(f"ftcore.{kind}", {})
        found = {o.name: o.module for o in installed().options(kind) if o.dist == "ftcore"}
        assert found == declared, "entry points are fixed at install: run `pip install -e .` again"


def test_names_of_families_trainers_and_exporters_are_not_in_the_core() -> None:
    """The core knows kinds, never options."""
    names = {n for kind in ("model", "trainer", "export", "quantizer") for n in installed().names(kind)}
    names -= {"safetensors", "gguf", "hub", "adapter", "reward"}  # also file formats, a place, and kinds
    word = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names))) + r")\b")
    help_texts = {"help.py", "cli.py"}  # examples shown to people
    for file in (ROOT / "ftcore").rglob("*.py"):
        if file.name in help_texts or "testing" in file.parts or "scaffold" in file.parts:
            continue
        code = re.sub(r'""".*?"""', "", file.read_text(), flags=re.S)
        code = re.sub(r"#.*|\"[^\"\n]*[+=`][^\"\n]*\"", "", code)  # comments, and messages that show a command
        code = code.replace("llama.cpp", "")  # a program, which happens to be named after a family
        assert not word.search(code), f"{file}: {word.search(code)}"


def test_removing_an_entry_point_removes_one_family() -> None:
    options = [o for kind in KINDS for o in installed().options(kind)]
    without = Catalog(o for o in options if (o.kind, o.name) != ("model", "qwen3"))
    for kind in KINDS:
        gone = set(installed().names(kind)) - set(without.names(kind))
        assert gone == ({"qwen3"} if kind == "model" else set())
    with pytest.raises(Refused, match="there is no model named 'qwen3'"):
        without.find("model", "qwen3")


def test_a_contested_name_names_both_packages_and_the_way_out() -> None:
    ours = installed().find("model", "qwen3")
    theirs = Option("model", "qwen3", "acme_ft.qwen3", "acme-ft", "1.2")
    contested = Catalog([ours, theirs])
    with pytest.raises(Refused) as refused:
        contested.find("model", "qwen3")
    assert str(refused.value) == (
        f"model=qwen3: is offered by 2 packages: ftcore {ours.version} (ftcore_models.qwen3), "
        "acme-ft 1.2 (acme_ft.qwen3)\n"
        "    fix: say model=acme-ft:qwen3"
    )
    assert contested.find("model", "acme-ft:qwen3") is theirs
    assert contested.find("model", "acme_ft:qwen3") is theirs
    assert contested.find("model", "ftcore:qwen3") is ours


def test_a_broken_plugin_is_named_and_breaks_only_itself() -> None:
    broken = Option("model", "broken", "no_such_module_anywhere", "acme-ft", "1.2")
    catalog = Catalog([broken, installed().find("model", "qwen3")])
    assert catalog.names("model") == ["broken", "qwen3"]
    assert catalog.find("model", "qwen3").load()
    with pytest.raises(PluginError, match=r"model=broken of acme-ft 1\.2 .* cannot be imported: ModuleNotFoundError"):
        catalog.find("model", "broken").load()


def test_listing_imports_no_plugin_and_no_torch() -> None:
    code = (
        "import sys\nfrom ftcore.catalog import installed\ninstalled().names('model')\n"
        "bad = [m for m in ('torch', 'transformers', 'hydra', 'ftcore_models.qwen3') if m in sys.modules]\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_field_of_every_config_has_help() -> None:
    for kind in KINDS:
        for option in installed().options(kind):
            for name, text in field_help(option.config_class()).items():
                assert text, f"{option.kind}/{option.name}: {name} has no help string under it"
    assert all(field_help(RunConfig).values())


def test_import_roots_hold_no_package() -> None:
    """A package named `kernels` of ours would shadow Hugging Face's."""
    for root in ("plugins", "kernels", "conf"):
        assert not (ROOT / root / "__init__.py").exists()
