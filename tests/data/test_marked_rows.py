"""Rows that are marked as not to be learnt."""

from __future__ import annotations

import pytest

from ftcore_data import pairs, sharegpt


def test_a_turn_of_no_weight_stays_one() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "bad", "weight": 0}]
    assert sharegpt.convert({"conversations": turns})["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "bad", "weight": 0},
    ]
    turns[1]["weight"] = 1
    assert sharegpt.convert({"conversations": turns})["messages"][1]["weight"] == 1


@pytest.mark.parametrize("mark", [{"label": 0}, {"score": 0.0}, {"label": 1}])
def test_a_pair_that_is_scored_is_not_taken_for_alike(mark: dict[str, float]) -> None:
    row = {"query": "q", "passage": "p"}
    assert pairs.check(row) is None
    reason = pairs.check(row | mark)
    assert reason is not None
    assert f"'{next(iter(mark))}' that rows of this format do not use" in reason
