"""The bench of few rows runs for real on tiny shapes, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import few_rows
import pytest

pytest.importorskip("triton")


def test_it_measures_and_compares_every_configuration(tmp_path: Path) -> None:
    script = Path(few_rows.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--tiny", "--shapes", "qkv", "--rows", "5"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nf4 TABLE = {16: Config(" in done.stdout
    assert "fp8 TABLE = {16: Config(" in done.stdout
    results = json.loads((tmp_path / "few-rows.json").read_text(encoding="utf-8"))["results"]
    cuts = [f"nf4 {cut}" for cut in few_rows.TINY_CUTS] + [f"fp8 {cut}" for cut in few_rows.TINY_FP8_CUTS]
    assert [result["what"] for result in results] == [*cuts, "unpacked", "dequantized", "fp8 padded"]
    assert all(result["off"] < 1e-6 for result in results)


def result(what: str, seconds: float, rows: int, status: str = "ok") -> dict[str, Any]:
    return {"case": {"shape": "out", "rows": rows}, "what": what, "status": status, "seconds": seconds}


def test_the_table_has_the_best_that_is_right() -> None:
    ours = [
        result("nf4 (1,)", 1.0, 8),
        result("nf4 (2,)", 2.0, 8),
        result("nf4 (1,)", 2.0, 40, "WRONG"),
        result("nf4 (2,)", 3.0, 40),
        result("fp8 (3,)", 4.0, 8),
    ]
    *lines, nf4, fp8 = few_rows.steps([*ours, result("unpacked", 0.5, 8)], [8, 40])
    assert lines == [
        "a step x 8, ms: unpacked 16000.00; nf4 (1,) 32000.00; nf4 (2,) 64000.00; fp8 (3,) 128000.00",
        "a step x 40, ms: nf4 (2,) 96000.00",
    ]
    assert nf4 == "nf4 TABLE = {16: Config(1,), 64: Config(2,)}"
    assert fp8 == "fp8 TABLE = {16: Config(3,)}"
