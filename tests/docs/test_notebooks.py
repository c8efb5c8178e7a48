"""The notebooks run from top to bottom in an empty folder, offline, and are committed without outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nbformat
import pytest
from docs_pages import ROOT
from nbclient import NotebookClient

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == "command_line" else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path: Path, environment: Mapping[str, str], tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, kernel_name="python3", timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(environment))
    if path.stem == "command_line":
        assert (tmp_path / "my-run" / "export" / "safetensors" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert cells
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count] == []
