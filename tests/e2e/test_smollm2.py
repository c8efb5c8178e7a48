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
