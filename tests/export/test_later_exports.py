"""An export of a finished run is as one at its end."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ftcore.adapter_folder import saved_template
from ftcore.api import run as train
from ftcore.api import validated
from ftcore.checkpoint import config_of
from ftcore.cli import run as command
from ftcore.tasks._trained import trained_config
from ftcore.testing import runs
from ftcore.trained_model import _fetched
from ftcore_exporters._card import base_id
from ftcore_exporters._ollama.modelfile import modelfile
from ftcore_exporters._ollama.parameters import context
from ftcore_exporters._recorded import origin

TINY = ["+model=llama", "model.tiny=true", "model.dtype=float32", "prompts=[]"]


def test_a_full_fine_tune_is_not_stretched_again(tmp_path: Path) -> None:
    """What was saved has its longer context and its new tokens already."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.json").write_text("{}")
    config = validated([*TINY, "model.max_length=2048", "model.rope_scaling={rope_type: yarn, factor: 4.0}",
                        'model.new_tokens=["<x>"]', "adapter=full"])  # fmt: skip
    model = trained_config(replace(config, run=str(tmp_path))).model
    assert model is not None
    assert (model.path, model.max_length, model.rope_scaling, model.new_tokens) == (
        str(tmp_path / "trained"), None, {}, [],
    )  # fmt: skip


@pytest.fixture
def later(tmp_path: Path) -> Path:
    recorded = {"model": {"id": "meta-llama/Llama-3.2-1B", "path": None, "revision": "abc", "tiny": False},
                "trainer": {"max_length": 16384}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    return tmp_path


def test_its_context_and_its_base_are_those_of_the_run(later: Path) -> None:
    _, plan = runs.prepared(TINY)
    assert plan.run.model is not None
    config = copy.deepcopy(config_of(plan.run.model, plan.family))
    config.max_position_embeddings = 2**20
    assert context(plan, config, None) == 4096
    model = replace(plan.run.model, path=str(later / "trained"), tiny=False)
    plan = replace(plan, run=replace(plan.run, run=str(later), trainer=None, model=model))
    assert context(plan, config, None) == 16384
    assert (origin(plan).id, origin(plan).revision, origin(plan).path) == ("meta-llama/Llama-3.2-1B", "abc", None)
    assert base_id(plan) == "meta-llama/Llama-3.2-1B"
    assert base_id(replace(plan, run=replace(plan.run, run=None))) is None


def test_every_named_chat_template_is_there_again(tmp_path: Path) -> None:
    """One for tools, say, that the base's tokenizer has beside the usual one."""
    from ftcore import checkpoint

    _, plan = runs.prepared(TINY)
    assert plan.run.model is not None
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(checkpoint.locate(plan.run.model, plan.family), base)
    words = [*TINY, "model.tiny=false", f"model.path='{base}'"]
    tokenizer = runs.loaded(words).tokenizer
    named = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}" + tokenizer.chat_template}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base)
    loaded = runs.loaded(words)
    assert loaded.tokenizer.chat_template == named
    loaded.model.save_pretrained(saved)
    loaded.tokenizer.save_pretrained(saved)
    again = runs.loaded([*words, f"adapter.path='{saved}'"])
    assert again.tokenizer.chat_template == named


def test_chat_templates_in_the_config_of_older_adapters(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert saved_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "a"}))
    assert saved_template(tmp_path) == "a"
    entries = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": entries}))
    assert saved_template(tmp_path) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert saved_template(tmp_path) == "c"


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_repository_only_the_checkpoint_is_fetched(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the other forms of its weights that lie beside."""
    from huggingface_hub.utils import filter_repo_objects

    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)] if sharded else ["model.safetensors"]
    wanted = {"config.json", *parts, *(["model.safetensors.index.json"] if sharded else [])}
    others = {
        "consolidated.safetensors",
        "original/params.json",
        "original/model.safetensors",
        "model.fp16.safetensors",
    }
    index = json.dumps({"weight_map": {str(number): name for number, name in enumerate(parts)}})
    revisions = []

    def fetch(repo: str, revision: str | None, **patterns: list[str]) -> str:
        revisions.append(revision)
        for name in filter_repo_objects(wanted | others, **patterns):
            file = tmp_path / "c0ffee" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(index)
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    folder = _fetched("me/pebble", "main")
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} == wanted
    assert revisions == ["main", "c0ffee"]


def test_large_numbers_are_whole_in_a_modelfile() -> None:
    text = modelfile("x.gguf", parameters=[("num_ctx", 1_048_576), ("temperature", 0.7)])
    assert "PARAMETER num_ctx 1048576\n" in text
    assert "PARAMETER temperature 0.7\n" in text


def test_a_head_that_an_export_does_not_take_is_refused_later_too(in_tmp: Path, capsys) -> None:
    train([*TINY, "+trainer=reward", "trainer.max_steps=1", "output_dir=run"])
    assert command(["export", "run=run", "+export=[int4]"]) == 2
    assert "int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "+export=[vllm] export.vllm.form=adapter",
        "+export=[sglang] export.sglang.form=adapter",
        "+export=[gguf] export.gguf.lora=true",
    ],
)
def test_an_adapter_alone_over_another_rope_is_refused(words: str, in_tmp: Path, capsys) -> None:
    """Who serves it would serve the base with its own."""
    stretched = ["model.max_length=131072"]
    assert command(["plan", *TINY, "+trainer=sft", *stretched, *words.split()]) == 2
    assert "RoPE" in capsys.readouterr().err
    command(["plan", *TINY, "+trainer=sft", *words.split()])
    assert "RoPE" not in capsys.readouterr().err
