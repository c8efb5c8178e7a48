"""The core of a product of parameters that the default step runs (tests/few.py)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from few import covering


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 2), (9, 3), (3, 9, 2), (5, 4, 3, 2)], ids=str)
def test_every_value_is_there_and_no_more_cases_than_it_takes(sizes: tuple[int, ...]) -> None:
    cases = [list(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    core = covering(cases)
    assert {value for number in core for value in cases[number]} == {value for case in cases for value in case}
    assert len(core) == max(sizes)


def test_values_meet_others_each_time() -> None:
    cases = [[("a", a), ("b", b)] for a in range(6) for b in range(3)]
    met = [cases[number][1][1] for number in sorted(covering(cases))]
    assert [met.count(b) for b in range(3)] == [2, 2, 2]


def test_a_value_that_only_one_case_has_is_there() -> None:
    assert covering([[("a", 0)], [("a", 0)], [("a", 1)]]) == {0, 2}
    assert covering([]) == set()


TESTS = """
import pytest

@pytest.mark.few
@pytest.mark.parametrize("b", ["x", "y", pytest.param("z", marks=pytest.mark.slow)])
@pytest.mark.parametrize("a", [1, 2, 3])
def test_product(a, b): ...

@pytest.mark.few
@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.skipif(True, reason="never here"))])
def test_skipped(a): ...

@pytest.mark.parametrize("b", "xy")
@pytest.mark.parametrize("a", [1, 2])
def test_not_marked(a, b): ...
"""


@pytest.mark.parametrize(
    ("selected", "found"),
    [
        (
            "not slow",
            "product[1-x] product[2-y] product[3-x] skipped[1] skipped[2] not_marked[1-x] not_marked[1-y]"
            " not_marked[2-x] not_marked[2-y]",
        ),
        ("slow", "product[1-y] product[1-z] product[2-x] product[2-z] product[3-y] product[3-z]"),
    ],
)
def test_both_steps_together_run_every_case(selected: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-p", "few", "-p", "no:cacheprovider", "-q", "--collect-only", "-m", selected, "-c", "none.ini"]
    (tmp_path / "none.ini").write_text("[pytest]\nmarkers =\n    few: x\n    slow: y\n")
    script = (
        "import sys, types, pytest\n"
        "torch = sys.modules['torch'] = types.ModuleType('torch')\n"
        "torch.cuda = types.SimpleNamespace(is_available=lambda: False)\n"  # the same where there is a GPU
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        f"sys.exit(pytest.main({[*options, 'test_it.py']!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("test_it.py::test_")]
    assert " ".join(line.removeprefix("test_it.py::test_") for line in lines) == found
