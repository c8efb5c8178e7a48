"""RoPE is scaled by itself where that is plain, is said in the plan, and is asked about where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ftcore
from ftcore import cli
from ftcore.catalog import installed
from ftcore.checkpoint import locate
from ftcore.config import ModelConfig
from ftcore.rope import scaling

LLAMA = installed().find("model", "llama").load().ftcore_model_family()
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


def rotary(words: list[str]) -> tuple[Any, Any]:
    """The config and the module that turns queries and keys."""
    model, _ = ftcore.load(words)
    modules = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    return model.config.get_text_config(), modules[0]


def test_a_rope_for_each_kind_of_layer_is_scaled_in_those_that_see_the_whole_row(in_tmp: Path) -> None:
    """By itself it is not; what the plan then says to write is done, for layers without a window."""
    words = ["+model=gemma3", "model.tiny=true", "model.max_length=40960"]
    with pytest.raises(ftcore.Refused, match="its RoPE is no plain one to scale") as refused:
        ftcore.load(words)
    _, plain = rotary(words[:2])
    config, scaled = rotary([*words, said(refused.value)])
    assert config.rope_parameters["full_attention"]["original_max_position_embeddings"] == 2048
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert torch.equal(scaled.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
    assert scaled.full_attention_inv_freq[-1] == pytest.approx(plain.full_attention_inv_freq[-1] / 20)


def said(refused: ftcore.Refused) -> str:
    """The scaling that the one problem says to write, as a word."""
    (problem,) = refused.problems
    assert problem.fix is not None and problem.fix.startswith("use 'model.rope_scaling=")
    return problem.fix.removeprefix("use ").strip("'")


def test_a_family_s_defaults_are_seen_by_the_plan(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 3's tiny config does not name its two kinds of RoPE: transformers does."""
    words = ["plan", "+model=gemma3", "model.tiny=true", "+trainer=sft", "model.max_length=40960"]
    assert cli.run(words) != 0
    said = capsys.readouterr()
    assert "its RoPE is no plain one to scale" in said.err
    assert "No problems found" not in said.out


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OWN = {
    "llama3": LLAMA3 | {"original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "original_max_position_embeddings": 256},
    "linear": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize("kind", OWN)
def test_a_checkpoint_s_own_scaling_goes_on_from_what_it_was_made_for(in_tmp: Path, kind: str) -> None:
    """Twice the context is twice the factor over the same original context, with what else the checkpoint says."""
    from transformers import AutoConfig

    own = {"rope_theta": 10000.0, **OWN[kind]}
    words = longer_than(in_tmp, own)
    with pytest.raises(ftcore.Refused, match="its RoPE is no plain one to scale") as refused:
        ftcore.load([*words, "model.max_length=4096"])
    config, module = rotary([*words, "model.max_length=4096", said(refused.value)])
    assert config.rope_parameters == own | {"factor": 16.0}
    asked = AutoConfig.from_pretrained("model", rope_parameters=own | {"factor": 16.0})
    assert torch.equal(module.inv_freq, type(module)(asked).inv_freq)


def longer_than(folder: Path, rope: dict[str, Any]) -> list[str]:
    """A checkpoint of the tiny model with a RoPE of its own, as words."""
    tiny = Path(locate(ModelConfig(name="llama", tiny=True), LLAMA))
    shutil.copytree(tiny, folder / "model")
    config = json.loads((tiny / "config.json").read_text()) | {"rope_parameters": rope}
    folder.joinpath("model", "config.json").write_text(json.dumps(config))
    return ["+model=llama", "model.path=model"]


def test_a_checkpoint_with_another_kind_of_scaling_is_given_no_wrong_advice(in_tmp: Path) -> None:
    words = longer_than(in_tmp, {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(ftcore.Refused, match=r"stay within it: model\.max_length=2048"):
        ftcore.load([*words, "model.max_length=4096"])
    ftcore.load([*words, "model.max_length=2048"])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("{rope_type: dynamic, factor: 4}", "a dynamic one does not stretch the context to model\\.max_length=4096"),
        ("{factor: 4}", "names no rope_type that scales"),
    ],
)
def test_a_scaling_that_would_do_nothing_is_refused(in_tmp: Path, scaling: str, message: str) -> None:
    words = ["+model=llama", "model.tiny=true", "model.max_length=4096"]
    with pytest.raises(ftcore.Refused, match=message) as refused:
        ftcore.load([*words, f"model.rope_scaling={scaling}"])
    if "dynamic" in scaling:
        assert rotary([*words, said(refused.value)])[0].rope_parameters["rope_type"] == "yarn"


def test_a_type_may_be_named_as_older_configs_do(in_tmp: Path) -> None:
    config, _ = rotary(["+model=llama", "model.tiny=true", "model.rope_scaling={type: linear, factor: 4}"])
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4)
