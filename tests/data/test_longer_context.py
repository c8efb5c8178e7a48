"""RoPE is scaled by itself where that is plain, is said in the plan, and is asked about where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore import cli
from ftcore.catalog import installed
from ftcore.config import ModelConfig
from ftcore.rope import scaling

QWEN3 = installed().find("model", "qwen3").load().ftcore_model_family()
YARN = {"rope_type": "yarn", "factor": 1.5}


def checkpoint(folder: Path, **settings: Any) -> ModelConfig:
    folder.joinpath("config.json").write_text(json.dumps({"model_type": "qwen3", **settings}))
    return ModelConfig(path=str(folder), max_length=6144)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_position_embeddings": 4096}, YARN),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, YARN),
        ({"max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 1e6}, YARN),
        ({"max_position_embeddings": 8192}, {}),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, {}),
        ({}, {}),
    ],
)
def test_scaling(tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert scaling(checkpoint(tmp_path, **settings), QWEN3) == expected


def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, max_position_embeddings=4096)
    model.rope_scaling = {"rope_type": "linear", "factor": 4.0}
    assert scaling(model, QWEN3) == model.rope_scaling


def test_the_plan_says_it(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+model=qwen3", "model.tiny=true", "+trainer=sft", "model.max_length=4096"]
    assert cli.run(["plan", *words]) == 0
    assert "4,096 tokens, RoPE scaled by yarn x2" in capsys.readouterr().out
    own = {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}
    in_tmp.joinpath("model").mkdir()
    checkpoint(in_tmp / "model", **own)
    assert cli.run(["plan", "+model=qwen3", "model.path=model", "+trainer=sft", "model.max_length=6144"]) != 0
    assert "its RoPE is no plain one to scale" in capsys.readouterr().err


def test_a_rope_for_each_kind_of_layer_is_not_scaled_by_itself() -> None:
    import ftcore

    with pytest.raises(ftcore.Refused, match="its RoPE is no plain one to scale"):
        ftcore.load(["+model=gemma3", "model.tiny=true", "model.max_length=40960"])
