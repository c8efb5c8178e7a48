"""The bench of 8-bit AdamW runs for real on a few small parameters."""

from __future__ import annotations

import math
import re

import optimizer_step
import pytest


def test_both_ways_are_timed_and_chance_moves_more(capsys: pytest.CaptureFixture[str]) -> None:
    """At a low rate, rounding to the nearest leaves most weights where they are."""
    assert optimizer_step.main(["--device", "cpu", "--tiny", "--steps", "2"]) == 0
    found = re.findall(r"(\w+): (\d+\.\d+) ms over 12,288 parameters, (\d+\.\d)% moved", capsys.readouterr().out)
    assert [name for name, *_ in found] == ["nearest", "chance"]
    assert all(float(ms) > 0 for _, ms, _ in found)
    assert float(found[0][2]) < float(found[1][2])


def test_the_shapes_are_those_of_the_model() -> None:
    assert sum(map(math.prod, optimizer_step.SHAPES)) == pytest.approx(1.236e9, rel=1e-3)
