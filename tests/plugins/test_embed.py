"""Sentence embeddings: pooling, losses, what is measured, saved and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ftcore.api import run
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import load_trained
from ftcore.testing import runs
from ftcore_trainers._measures import recall_at_1, spearman
from ftcore_trainers._pairs import cosine_loss, one_left, ranking_loss
from ftcore_trainers._pooling import embeddings

TINY = ("+model=bert", "model.tiny=true", "model.dtype=float32", "+trainer=embed")
SHORT = ("trainer.max_steps=3", "trainer.global_batch=4", "trainer.max_length=64", "trainer.learning_rate=0.005")
WORDS = ("bread", "a cat", "the rain", "my bike")


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def refused(*words: str) -> str:
    problems = runs.refusals([*TINY, *words])
    assert problems, "the plan takes it"
    assert all(problem.fix for problem in problems)
    return "; ".join(f"{problem.key}: {problem.message}" for problem in problems)


def pairs(negatives: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"anchor": f"where is {w}?", "positive": f"here is {w}"} for w in WORDS]
    return [row | {"negative": "nobody knows"} for row in rows] if negatives else rows


def scored() -> list[dict[str, Any]]:
    scores = (1.0, 0.1, 0.6, 0.3)
    return [{"sentence1": f"{w} one", "sentence2": f"{w} two", "score": s} for w, s in zip(WORDS, scores, strict=True)]


@pytest.mark.few
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(
    ("rows", "measured"), [(pairs(), "recall_at_1"), (pairs(negatives=True), "recall_at_1"), (scored(), "spearman")]
)
def test_loss_falls_and_the_folder_says_how_it_pools(
    rows: list[dict[str, Any]], measured: str, adapter: str, tmp_path: Path
) -> None:
    path = written(tmp_path, rows)
    words = [*TINY, *SHORT, f"adapter={adapter}", f"data.path='{path}'", f"data.eval_path='{path}'", "data=pairs"]
    result = run([*words, "+export=[safetensors]", f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert {f"eval_{measured}", f"eval_{measured}_before"} <= set(result.metrics)
    for folder in (tmp_path / "run" / "trained", tmp_path / "run" / "export" / "safetensors"):
        parts = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        assert [part["type"].rpartition(".")[2] for part in parts] == ["Transformer", "Pooling", "Normalize"]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        assert pooling["pooling_mode_mean_tokens"] is True
        assert pooling["word_embedding_dimension"] == 64

    again = load_trained(config_of([f"run={tmp_path / 'run'}"]))
    exported = transformers.AutoModel.from_pretrained(tmp_path / "run" / "export" / "safetensors", dtype=torch.float32)
    inputs = dict(again.tokenizer(list(WORDS), padding=True, return_tensors="pt"))
    with torch.no_grad():
        ours, theirs = embeddings(again.model.eval(), inputs), embeddings(exported.eval(), inputs)
    assert torch.allclose(ours, theirs, atol=2e-3)
    again.tokenizer.save_pretrained(tmp_path / "later")
    assert (tmp_path / "later" / "modules.json").is_file()


def test_every_adapter_gets_a_gradient() -> None:
    loaded = runs.loaded(list(TINY))
    runs.shake(loaded.model, trainable_only=True)
    inputs = [dict(loaded.tokenizer(texts, padding=True, return_tensors="pt")) for texts in (["a b", "c"], ["d", "ef"])]
    first, second = (embeddings(loaded.model, batch) for batch in inputs)
    ranking_loss(first, second, None, torch.zeros(2, 2, dtype=torch.bool), 20.0).backward()
    trained = {name: p.grad for name, p in loaded.model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in trained.items() if gradient is None or not gradient.any()]
    assert trained
    assert missing == []


def test_padding_does_not_change_an_embedding() -> None:
    loaded = runs.loaded([*TINY, "adapter=full"])
    alone = dict(loaded.tokenizer(["a cat"], return_tensors="pt"))
    padded = dict(loaded.tokenizer(["a cat", "a much longer text than that"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        one, both = (embeddings(loaded.model.eval(), inputs) for inputs in (alone, padded))
    assert torch.allclose(one[0], both[0], atol=1e-5)
    assert torch.allclose(both.norm(dim=1), torch.ones(2), atol=1e-6)


def test_ranking_loss_by_hand() -> None:
    """Cross entropy of cosines times 20; a repeated second text is no negative, a given one is."""
    first = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.1, 1.0], [1.0, 1.0]]), dim=1)
    second = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    same = torch.tensor([[False, False, True], [False, False, False], [True, False, False]])
    scores = 20 * first @ second.T
    rows = [[0, 1], [1, 0, 2], [2, 1]]
    wanted = sum(torch.logsumexp(scores[n, columns], 0) - scores[n, n] for n, columns in enumerate(rows)) / 3
    assert torch.isclose(ranking_loss(first, second, None, same, 20.0), wanted)
    with_wrong = ranking_loss(first, second, second[:1], torch.zeros_like(same), 20.0)
    wide = torch.cat([scores, scores[:, :1]], dim=1)
    assert torch.isclose(with_wrong, torch.nn.functional.cross_entropy(wide, torch.arange(3)))


def test_cosine_loss_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    loss = cosine_loss(first, second, torch.tensor([0.5, 0.0]))
    assert loss.item() == pytest.approx(((0.6 - 0.5) ** 2 + 1) / 2)


def test_recall_and_spearman_by_hand() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert recall_at_1(vectors, vectors) == 1
    assert recall_at_1(vectors, vectors[[1, 0, 2]]) == pytest.approx(1 / 3)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(0.8660254)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_mistakes_are_told_before_weights_load(tmp_path: Path) -> None:
    five = written(tmp_path, [row | {"score": 5 * row["score"]} for row in scored()], "five.jsonl")
    assert "five.jsonl:1: has the score 5, and a cosine is at most 1" in refused(f"data.path='{five}'", "data=pairs")
    mixed = written(tmp_path, [*pairs(), *scored()], "mixed.jsonl")
    assert "mixed.jsonl:5: has a score, and the row at" in refused(f"data.path='{mixed}'", "data=pairs")
    path = written(tmp_path, pairs())
    assert "trainer.micro_batch: in a batch of 1" in refused(f"data.path='{path}'", "trainer.micro_batch=1")
    assert "trainer.scale" in refused(f"data.path='{path}'", "trainer.scale=0")
    texts = written(tmp_path, [{"text": "words"}], "texts.jsonl")
    assert "text rows have the shape 'text', but embed takes pairs" in refused(f"data.path='{texts}'", "data=text")
    assert runs.refusals([*TINY, f"data.path='{path}'"]) == ()


def test_a_checkpoint_that_pools_otherwise_is_refused(tmp_path: Path) -> None:
    loaded = runs.loaded([*TINY, "adapter=full"])
    model: Any = loaded.model
    model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    words = ["+model=bert", f"model.path='{tmp_path}'", "+trainer=embed"]
    assert runs.refusals(words) == ()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    assert ["pools by cls_token" in problem.message for problem in runs.refusals(words)] == [True]


def test_a_checkpoint_of_the_hub_that_pools_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str, **_: Any) -> str:
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    problems = runs.refusals(["+model=bert", "model.id=someone/pools-by-the-last", "+trainer=embed"])
    assert [p.key for p in problems if "pools by lasttoken" in p.message] == ["model.id"]
    assert ("someone/pools-by-the-last", "1_Pooling/config.json") in asked


def test_a_whole_batch_is_each_others_negatives(tmp_path: Path) -> None:
    path = written(tmp_path, pairs())
    for words, rows in ((["trainer.global_batch=24"], 24), (["trainer.global_batch=24", "trainer.micro_batch=6"], 6)):
        _, plan = runs.prepared([*TINY, f"data.path='{path}'", *words])
        assert plan.run.trainer is not None
        assert plan.run.trainer.micro_batch == rows


def test_a_pair_is_never_alone_with_itself(tmp_path: Path) -> None:
    """Five rows of pairs are one step of four; all held-out rows, and all scored ones, are read."""
    path = written(tmp_path, [*pairs(), {"anchor": "and the fifth?", "positive": "the last"}])
    words = [*TINY, *SHORT, f"data.path='{path}'", f"data.eval_path='{path}'", f"output_dir='{tmp_path / 'run'}'"]
    run(words)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["loss"] > 0 for entry in logged if "loss" in entry)
    assert one_left([{"anchor": "a"}] * 5, 4)
    assert not one_left([{"anchor": "a"}] * 6, 4)
    assert not one_left([{"anchor": "a"}], 4)
    assert not one_left([{"score": 0.5}] * 5, 4)


def test_a_run_that_goes_on_keeps_its_negatives(tmp_path: Path) -> None:
    path, folder = written(tmp_path, pairs()), tmp_path / "run"
    run([*TINY, *SHORT, f"data.path='{path}'", "trainer.save_steps=1", f"output_dir='{folder}'"])
    again = [f"run='{folder}'", "resume=last", f"output_dir='{folder}'", "trainer.max_steps=5"]
    assert runs.refusals(again) == ()
    assert [p.key for p in runs.refusals([*again, "trainer.micro_batch=2"])] == ["trainer.micro_batch"]


def test_scores_that_no_plan_has_seen_are_such_as_a_cosine_has() -> None:
    from ftcore.errors import Refused
    from ftcore_trainers._pairs import Pairs

    collate = Pairs(lambda texts: {"input_ids": torch.zeros(len(texts), 1)})
    row = {"sentence1": "a", "sentence2": "b"}
    assert collate([row | {"score": -1.0}])["labels"].tolist() == [-1.0]
    with pytest.raises(Refused, match=r"a score of 4\.5 in size"):
        collate([row | {"score": 0.5}, row | {"score": 4.5}])
