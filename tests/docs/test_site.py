"""The site builds, its generated pages are fresh, and nothing that should be documented is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest
from docs_pages import PAGES, ROOT

from ftcore import hooks
from ftcore.catalog import Option, field_help, installed
from ftcore.config import KINDS, PatchingConfig, PreviewConfig, RunConfig, SamplingConfig
from ftcore.manager import spec_names

if TYPE_CHECKING:
    from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OWN = [option for kind in KINDS for option in installed().options(kind) if option.dist == "ftcore"]


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in home
    python = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "ftcore.run" in python
    pages = (tmp_path / "site").rglob("index.html")
    unread = [page for page in pages if any(mark in page.read_text(encoding="utf-8") for mark in ("```", "no_test="))]
    assert unread == []  # fences that the site took for text


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", spec_names())
def test_every_hook_is_documented(name: str) -> None:
    assert getattr(hooks, name).__doc__
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")
    assert f"\n### {name}\n" in page


@pytest.mark.parametrize("option", OWN, ids=lambda option: f"{option.kind}/{option.name}")
def test_every_key_of_a_plugin_has_help(option: Option) -> None:
    cls = option.config_class()
    assert [f.name for f in fields(cls) if not field_help(cls).get(f.name)] == []
    assert option.summary()
    page = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    assert f"\n### {option.kind}/{option.name}\n" in page


@pytest.mark.parametrize("cls", [RunConfig, PatchingConfig, PreviewConfig, SamplingConfig, *KINDS.values()])
def test_every_key_of_a_run_has_help(cls: type) -> None:
    assert [f.name for f in fields(cls) if not field_help(cls).get(f.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link.partition("#")[0]).exists()] == []


def test_readme_tells_of_every_option() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## What works today")[2].partition("**Not yet**")[0]
    assert [f"{o.kind}/{o.name}" for o in OWN if f"`{o.name}`" not in table] == []
    assert f"A run is {len(spec_names())} hooks" in readme


def test_nothing_names_this_machine() -> None:
    owned = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*.ipynb")]
    local = re.compile(r"/(work|opt|root|tmp)/|pypi" + r"\.org")
    assert [str(page) for page in owned if local.search(page.read_text(encoding="utf-8"))] == []
