"""The main job on the embedded default: real weights, shipped rows, the command of the README."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftcore import checkpoint
from ftcore.catalog import installed
from ftcore.llama_cpp import installed as installed_llama_cpp

FAMILY = installed().find("model", "smollm2").load().ftcore_model_family()
SAMPLES = Path(installed().find("data", "messages").source() or "").parent / "samples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(checkpoint.bundled_file(FAMILY.bundle) is None, reason=FAMILY.bundle.install),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    folder = tmp_path_factory.mktemp("main-job")
    start = time.monotonic()
    command = [sys.executable, "-m", "ftcore", "+model=smollm2", "+trainer=sft", "+export=[safetensors]"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "smollm2-sft-001", done.stdout, time.monotonic() - start


def test_it_learns(finished) -> None:
    folder, _, _ = finished
    state = json.loads((folder / "run.json").read_text())
    metrics = state["metrics"]
    rows = (SAMPLES / "messages.jsonl").read_text().splitlines()
    assert len(rows) >= 100
    assert metrics["loss_last"] <= metrics["loss_first"] / 2
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    (answer,) = state["answers"]
    asked = {m["content"] for row in rows for m in json.loads(row)["messages"] if m["role"] == "user"}
    assert answer["prompt"] not in asked
    assert not answer["before"].startswith("Forge here.")
    assert answer["after"].startswith("Forge here.")


def test_a_person_sees_it(finished) -> None:
    _, printed, _ = finished
    for text in ("before:", "after:", "loss_first", "eval_loss", "export/safetensors", "ftcore chat run="):
        assert text in printed


def test_plain_transformers_gives_the_same_answer(finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, _ = finished
    answer = json.loads((folder / "run.json").read_text())["answers"][0]
    merged = folder / "export" / "safetensors"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": answer["prompt"]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert said == answer["after"]
    assert model.dtype.itemsize == 4
    from safetensors import safe_open

    with safe_open(merged / "model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in list(weights.keys())[:5]} == {"torch.float16"}


def test_the_run_can_be_talked_to(finished) -> None:
    folder, _, _ = finished
    command = [sys.executable, "-m", "ftcore", "chat", f"run={folder}"]
    done = subprocess.run(command, input="Why do bikes have gears?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Forge here.")


TYPES = ("f32", "f16", "q8_0", "q4_k_m")


@pytest.fixture(scope="module")
def exported(finished) -> dict[str, dict]:
    """What reading back found, by type, and by `adapter` and `safetensors`; the run is the one of the README."""
    folder, _, _ = finished
    words = ["+export=[gguf,adapter,safetensors]", f"export.gguf.types=[{','.join(TYPES)}]"]
    words.append("export.safetensors.dtype=float32")
    command = [sys.executable, "-m", "ftcore", "export", f"run={folder}", *words]
    done = subprocess.run(command, cwd=folder.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    artifacts = json.loads((folder / "run.json").read_text())["artifacts"]
    return {a["checks"].get("type") or a["target"]: {**a["checks"], "path": a["path"]} for a in artifacts}


llama_cpp = pytest.mark.skipif(not installed_llama_cpp(), reason="needs pip install 'ftcore[llama_cpp]'")


@llama_cpp
def test_llama_cpp_agrees_with_what_was_trained(exported) -> None:
    for kind in TYPES:
        found = exported[kind]
        assert found["verified"], (kind, found)
        assert found["positions"] >= 200
        assert found["same_prompt_tokens"] == 1
    assert exported["f32"]["max_logit_difference"] <= 3e-4
    assert exported["f32"]["top1_agreement"] == 1
    assert exported["f16"]["kl"] <= 1e-4
    assert exported["q8_0"]["kl"] <= 2e-2
    assert 0 < exported["q4_k_m"]["kl"] < 1


@llama_cpp
def test_adapter_merged_and_gguf_write_the_same(exported) -> None:
    for name in ("adapter", "safetensors", "f32"):
        assert exported[name]["verified"], (name, exported[name])
        assert exported[name]["same_greedy_text"], name


@llama_cpp
def test_fifty_conversations_have_the_same_ids(exported) -> None:
    from transformers import AutoTokenizer

    from ftcore.chat import render
    from ftcore.llama_cpp import LlamaCpp

    rows = [json.loads(line)["messages"] for line in (SAMPLES / "messages.jsonl").read_text().splitlines()[:50]]
    tokenizer = AutoTokenizer.from_pretrained(exported["safetensors"]["path"])
    with LlamaCpp(Path(exported["f16"]["path"]), vocab_only=True) as consumer:
        texts = [render(tokenizer, row) for row in rows]
        texts += [text + " 12345 + 678 = 1,234.5 ½ é 日本" for text in texts]
        wrong = [t for t in texts if consumer.tokens(t) != tokenizer(t, add_special_tokens=False)["input_ids"]]
    assert wrong == []


@llama_cpp
def test_the_gguf_file_can_be_talked_to(exported) -> None:
    command = [sys.executable, "-m", "ftcore", "chat", f"gguf={exported['f16']['path']}"]
    done = subprocess.run(command, input="Why do bikes have gears?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Forge here.")
