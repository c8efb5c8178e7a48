"""What the operations share: rows without copies, and rules that every kernel file keeps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import ftcore_kernels.ops
import ftcore_kernels.reference
from ftcore_kernels.ops import _launch

SOURCES = sorted(Path(ftcore_kernels.ops.__path__[0]).glob("*.py"))
REFERENCES = sorted(Path(ftcore_kernels.reference.__path__[0]).glob("[!_]*.py"))

VIEWS = {  # a view, and whether its rows need a copy
    "contiguous": (lambda: torch.randn(2, 3, 4, 5), False),
    "row stride": (lambda: torch.randn(4, 12)[:, 2:7], False),
    "two strides": (lambda: torch.randn(4, 6, 8)[:, 1:, :3], False),
    "heads": (lambda: torch.randn(2, 3, 40)[..., 10:30].unflatten(-1, (4, 5)), False),
    "size one": (lambda: torch.randn(3, 1, 4, 1, 5).transpose(0, 3)[..., 1:], False),
    "expanded": (lambda: torch.randn(1, 5).expand(7, 5), False),
    "vector": (lambda: torch.randn(5), False),
    "empty": (lambda: torch.randn(3, 0, 5), False),
    "three strides": (lambda: torch.randn(4, 6, 8, 9)[::2, ::2, 1:5], True),
    "last dim strided": (lambda: torch.randn(4, 10)[:, ::2], True),
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_find_every_row(view):
    make, copied = VIEWS[view]
    x = make()
    rows = _launch.as_rows(x)
    assert (rows.tensor.data_ptr() != x.data_ptr()) == copied
    starts = [r // rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride for r in range(rows.number)]
    width = x.shape[-1]
    base = rows.tensor.storage_offset()
    found = [rows.tensor.as_strided((width,), (1,), base + start) for start in starts]
    expected = x.reshape(-1, width)
    assert rows.number == expected.shape[0]
    assert all(map(torch.equal, found, expected))


def test_every_operation_has_a_twin():
    assert [path.name for path in SOURCES if not path.name.startswith("_")] == [path.name for path in REFERENCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_program_ids_are_int64(path):
    """An int32 program id times a stride overflows silently at 2^31 elements."""
    assert not re.findall(r"tl\.program_id\([^)]*\)(?!\.to\(tl\.int64\))", path.read_text(encoding="utf-8"))


PTX = {("nf4_rows", "inline_asm")}
"""A shuffle among the lanes of a warp, beside a portable lookup that gives the same bits: `Config.lookup` chooses."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("banned", ["atomic_", "libdevice", "autotune", "inline_asm"])
def test_kernels_are_deterministic_and_portable(path, banned):
    assert banned not in path.read_text(encoding="utf-8") or (path.stem, banned) in PTX


def test_references_do_not_import_triton():
    names = ["ftcore_kernels.ops", *(f"ftcore_kernels.reference.{path.stem}" for path in REFERENCES)]
    code = f"import {', '.join(names)}; assert not [name for name in sys.modules if name.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"], check=True, timeout=120)
