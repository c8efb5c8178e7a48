"""Read-back: an artifact that is the model is verified, and one that is not is told apart by each of its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ftcore import agreement, pipeline
from ftcore.agreement import REPORTED, Agreement, Tolerance, tolerance
from ftcore.errors import Problem, Refused
from ftcore.llama_cpp import installed, library
from ftcore.probes import TEXTS
from ftcore.read_back import probes, read_back, read_back_folder, read_back_gguf
from ftcore.testing import runs
from ftcore.trained_model import Checkpoint

needs_llama_cpp = pytest.mark.skipif(not installed(), reason="llama.cpp is not installed")
PROMPTS = ["prompts=['What is 6 plus 7?']"]


def exported(folder: Path, *words: str, seed: int = 0) -> tuple[Checkpoint, Path]:
    """A tiny model with an adapter that does something, and what an exporter made of it."""
    hooks, plan = runs.prepared([*runs.TINY, *PROMPTS, *words, f"output_dir='{folder}'"])
    loaded = pipeline.load(hooks, plan)
    torch.manual_seed(seed)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    (artifact,) = pipeline.export(hooks, loaded)
    return Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=plan), artifact.path


def gguf(folder: Path, kind: str, seed: int = 0) -> tuple[Checkpoint, Path]:
    return exported(folder, "+export=[gguf]", f"export.gguf.types=[{kind}]", "export.gguf.verify=false", seed=seed)


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    return gguf(tmp_path_factory.mktemp("f32") / "run", "f32")


class Parrot:
    """A consumer that says what the trained model says, but for what is replaced."""

    name = "parrot"
    longest = 10_000

    def __init__(self, checkpoint: Checkpoint, **other: Any) -> None:
        from ftcore.consumers import Transformers

        self._model = Transformers(checkpoint.model, checkpoint.tokenizer, rendered=True)
        self.eog = other.pop("eog", self._model.eog)
        self._other = other

    def tokens(self, text: str) -> list[int]:
        return self._other.get("tokens", lambda ids: ids)(self._model.tokens(text))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self._other.get("logits", lambda values: values)(self._model.logits(ids))

    def greedy(self, ids: Sequence[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        return self._other.get("greedy", lambda new: new)(self._model.greedy(ids, count, stop))

    def close(self) -> None:
        pass


@needs_llama_cpp
def test_a_float32_file_is_the_model(f32: tuple[Checkpoint, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = f32
    checkpoint.model.train()
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    capsys.readouterr()
    found = read_back_gguf(checkpoint, file)
    assert found["verified"], found
    assert "reason" not in found
    assert (found["type"], found["consumer"], found["reference_dtype"]) == ("f32", "llama.cpp", "float32")
    assert found["positions"] >= 200
    assert found["max_logit_difference"] <= 1e-4
    assert 0 <= found["kl"] <= 1e-6
    assert found["top1_agreement"] == found["same_prompt_tokens"] == 1
    assert found["same_greedy_text"] and found["same_end_token"]
    assert capsys.readouterr().out == ""
    assert checkpoint.model.training
    after = checkpoint.model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@needs_llama_cpp
def test_another_models_file_is_told_apart(
    f32: tuple[Checkpoint, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = gguf(tmp_path / "run", "f32", seed=1)
    capsys.readouterr()
    found = read_back_gguf(f32[0], other)
    assert not found["verified"]
    assert "logits differ by up to" in found["reason"]
    assert found["max_logit_difference"] > 1e-2
    assert found["same_prompt_tokens"] == 1
    assert capsys.readouterr().out.startswith("warning: llama.cpp does not agree with the trained model: logits differ")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_rounded_types(kind: str, tmp_path: Path) -> None:
    found = read_back_gguf(*gguf(tmp_path / "run", kind))
    assert found["verified"], found
    assert found["type"] == kind
    assert 0 < found["kl"] < 1e-2
    assert found["max_logit_difference"] > 1e-6


@needs_llama_cpp
def test_a_broken_file_is_a_finding(
    f32: tuple[Checkpoint, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(f32[1].read_bytes()[:-20000])
    found = read_back_gguf(f32[0], half)
    assert found["verified"] is False
    assert "not within the file bounds" in found["reason"]
    assert "warning: llama.cpp" in capsys.readouterr().out


def test_without_llama_cpp_the_file_is_unverified(
    f32: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "PACKAGE", "a_package_that_is_not_there")
    assert read_back_gguf(*f32) == {
        "verified": False,
        "reason": "llama.cpp is not installed: pip install 'ftcore[llama_cpp]'",
    }


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"tokens": lambda ids: ids[1:]}, "100% of the prompts have other token ids"),
        ({"logits": lambda values: values + torch.eye(*values.shape)}, "logits differ by up to 1"),
        ({"logits": lambda values: values * float("nan")}, "its logits are not finite"),
        ({"eog": []}, "does not end an answer there"),
    ],
)
def test_each_disagreement_is_named(f32: tuple[Checkpoint, Path], other: dict[str, Any], problem: str) -> None:
    assert read_back(f32[0], Parrot(f32[0]))["verified"], "the parrot itself agrees"
    found = read_back(f32[0], Parrot(f32[0], **other))
    assert not found["verified"]
    assert problem in found["reason"]


def test_another_greedy_text_is_reported_only(f32: tuple[Checkpoint, Path]) -> None:
    found = read_back(f32[0], Parrot(f32[0], greedy=lambda new: new[:-1]))
    assert found["same_greedy_text"] is False
    assert found["verified"]


def test_a_consumer_that_stops_is_a_finding(f32: tuple[Checkpoint, Path]) -> None:
    def stops(_: Any) -> Any:
        raise Refused(Problem("file", "parrot stopped: SIGABRT"))

    found = read_back(f32[0], Parrot(f32[0], logits=stops))
    assert (found["verified"], found["reason"]) == (False, "parrot stopped: SIGABRT")


def test_a_padded_vocabulary_is_compared_where_both_have_one(f32: tuple[Checkpoint, Path]) -> None:
    wider = Parrot(f32[0], logits=lambda values: torch.nn.functional.pad(values, (0, 7), value=1e9))
    assert read_back(f32[0], wider)["verified"]


def test_numbers_by_hand() -> None:
    found = Agreement()
    wanted = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    found.add(wanted, torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.5]]))
    p, q = wanted[1].softmax(0), torch.tensor([0.0, 3.0, 0.5]).softmax(0)
    assert found.positions == 2
    assert found.largest == 3.0
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-6)
    assert found.numbers()["top1_agreement"] == 0.5


def test_what_is_tolerated() -> None:
    assert tolerance("f32", "float32") == Tolerance(logits=1e-3, kl=1e-6, relative=1e-4)
    assert tolerance("f32", "bfloat16") == Tolerance(kl=1e-2, relative=5e-2)
    assert tolerance("q8_0", "float32") == tolerance("q8_0", "bfloat16") == Tolerance(kl=2e-2, relative=5e-2)
    assert tolerance("q4_k_m", "float32") == tolerance("q4_k_m", "bfloat16") == REPORTED
    off = Agreement(positions=1, largest=2e-3, scale=100.0, divergence=1e-9)
    assert off.objection(tolerance("f32", "float32")) is None, "3e-5 of the largest logit"
    assert Agreement(positions=1, largest=2e-3, scale=3.0).objection(tolerance("f32", "float32"))
    assert "KL divergence is 0.5" in (Agreement(positions=2, divergence=1.0).objection(Tolerance(kl=0.1)) or "")
    assert Agreement(positions=2, divergence=1.0).objection(agreement.REPORTED) is None


@pytest.mark.parametrize("words", [["+model=bert", "model.tiny=true"], [*runs.TINY, "+trainer=reward"]])
def test_a_model_that_writes_no_text(words: list[str], tmp_path: Path) -> None:
    """One value of a head has no next token's distribution: its own size tells."""
    settings = ["+export=[safetensors]", "export.safetensors.verify=false", f"output_dir='{tmp_path / 'run'}'"]
    hooks, plan = runs.prepared([*words, *settings])
    loaded = pipeline.load(hooks, plan)
    (artifact,) = pipeline.export(hooks, loaded)
    checkpoint = Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=plan)
    found = read_back_folder(checkpoint, artifact.path)
    assert found["verified"], found
    assert 0 < found["relative_difference"] < 1e-2
    assert "kl" not in found and "same_greedy_text" not in found
    for parameter in loaded.model.parameters():
        parameter.data *= 1.2
    found = read_back_folder(checkpoint, artifact.path)
    assert not found["verified"]
    assert "of their norm" in found["reason"]


def test_a_merged_folder_is_the_model(tmp_path: Path) -> None:
    checkpoint, folder = exported(
        tmp_path / "run", "+export=[safetensors]", "export.safetensors.dtype=float32", "export.safetensors.verify=false"
    )
    found = read_back_folder(checkpoint, folder)
    assert found["verified"], found
    assert found["consumer"] == "transformers"
    assert found["positions"] >= 200
    assert found["max_logit_difference"] <= 1e-4
    assert found["same_greedy_text"]


def test_a_rounded_folder_is_measured_and_a_damaged_one_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = exported(tmp_path / "run", "+export=[safetensors]", "export.safetensors.verify=false")
    found = read_back_folder(checkpoint, folder)
    assert found["verified"], found
    assert 0 < found["kl"] <= 1e-3
    assert "more than 1e-12" in read_back_folder(checkpoint, folder, Tolerance(kl=1e-12))["reason"]
    with monkeypatch.context() as small:
        small.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        assert "do not fit into 1000 B of free host memory" in read_back_folder(checkpoint, folder)["reason"]
    next(folder.glob("*.safetensors")).write_bytes(b"no weights")
    found = read_back_folder(checkpoint, folder)
    assert found["verified"] is False
    assert found["reason"].startswith("transformers does not load it: ")


def test_probes_are_conversations_the_runs_own_first(f32: tuple[Checkpoint, Path]) -> None:
    checkpoint = f32[0]
    texts = probes(checkpoint)
    assert len(texts) >= 50
    assert len(set(texts)) == len(texts)
    assert "What is 6 plus 7?" in texts[0]
    assert texts[0] != "What is 6 plus 7?", "rendered"
    assert all(any(text.strip() in probe for probe in texts) for text in TEXTS)


def test_probes_without_a_template_that_takes_them_are_plain(f32: tuple[Checkpoint, Path]) -> None:
    checkpoint = f32[0]
    was = checkpoint.tokenizer.chat_template
    try:
        for template in (None, "{{ raise_exception('images only') }}"):
            checkpoint.tokenizer.chat_template = template
            assert checkpoint.plan.format is not None
            assert probes(checkpoint) == ["What is 6 plus 7?", *checkpoint.plan.format.sample_prompts, *TEXTS]
            assert read_back(checkpoint, Parrot(checkpoint))["positions"] >= 200
    finally:
        checkpoint.tokenizer.chat_template = was
