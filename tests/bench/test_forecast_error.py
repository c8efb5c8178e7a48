"""The comparison of the forecast with a GPU, tried without one."""

from __future__ import annotations

import json
from pathlib import Path

import forecast_error
import pytest
from forecast_error import CASES, error, good, line


def result(said: float, peak: float) -> dict[str, float]:
    return {"said_gib": said, "peak_gib": peak, "step_said": 0.1, "step": 0.2, "seconds": 3.0}


@pytest.mark.parametrize(
    ("said", "peak", "off"),
    [(10.0, 10.0, 0.0), (10.9, 10.0, 0.09), (11.1, 10.0, None), (9.6, 10.0, -0.04), (9.4, 10.0, None)],
)
def test_verdicts(said, peak, off) -> None:
    assert good(result(said, peak)) is (off is not None)
    if off is not None:
        assert error(result(said, peak)) == pytest.approx(off)
    assert line("a", result(said, peak)).count("OFF") == (off is None)


def test_nothing_measured_is_no_failure() -> None:
    assert error(result(1.0, 0.0)) is None
    assert good(result(1.0, 0.0))


def test_cases_are_what_they_should_cover() -> None:
    assert len(CASES) == len({case.name for case in CASES}) == 12
    assert {case.family for case in CASES} == {"llama", "qwen3", "gemma3"}
    assert {case.weights for case in CASES} == {"lora", "nf4", "full"}
    assert {case.memory for case in CASES} == {"off", "least", "offload"}
    assert {case.trainer for case in CASES} == {"sft", "dpo", "grpo"}


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert forecast_error.main(["--device", "cpu", "--tiny", "--only", "qwen3"]) == 0
    assert "6 cases, 0 beyond +10% / -5%" in capsys.readouterr().out
    kept = json.loads((tmp_path / "forecast-error.json").read_text(encoding="utf-8"))
    assert [of["case"]["trainer"] for of in kept] == ["sft", "sft", "grpo", "sft", "dpo", "sft"]
    assert all(of["said_gib"] > 0 and of["step"] > 0 for of in kept)
