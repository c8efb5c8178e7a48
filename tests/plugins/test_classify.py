"""Classification: classes from the rows, pairs and several classes, what is measured, saved and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ftcore import Refused
from ftcore.api import run
from ftcore.meta_model import on_meta
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import load_trained
from ftcore.testing import runs
from ftcore_trainers._measures import accuracy, macro_f1

TINY = ("+model=modernbert", "model.tiny=true", "model.dtype=float32", "+trainer=classify")
SHORT = ("trainer.max_steps=3", "trainer.global_batch=8", "trainer.max_length=64")
TEXTS = [("the soup was good", "good"), ("cold and late", "bad"), ("a fair price", "fair"), ("never again", "bad")]


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def labelled(folder: Path, rows: Sequence[tuple[str, Any]] = TEXTS, name: str = "rows.jsonl") -> str:
    return written(folder, [{"text": text, "label": label} for text, label in rows], name)


def refused(*words: str) -> str:
    problems = runs.refusals([*TINY, *words])
    assert problems, "the plan takes it"
    assert all(problem.fix for problem in problems)
    return "; ".join(f"{problem.key}: {problem.message}" for problem in problems)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_classes_are_found_measured_and_saved(adapter: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in TEXTS), encoding="utf-8")
    words = [*TINY, *SHORT, f"adapter={adapter}", f"data.path='{rows}'", f"data.eval_path='{rows}'"]
    result = run([*words, "+export=[safetensors]", f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    for name in ("accuracy", "macro_f1"):
        assert 0 <= result.metrics[f"eval_{name}_before"] <= 1
        assert 0 <= result.metrics[f"eval_{name}"] <= 1

    exported = tmp_path / "run" / "export" / "safetensors"
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["architectures"] == ["ModernBertForSequenceClassification"]
    classify = transformers.pipeline("text-classification", model=str(exported), dtype=torch.float32, device="cpu")
    theirs = {one["label"]: one["score"] for one in classify("cold and late", top_k=None)}
    again = load_trained(config_of([f"run={tmp_path / 'run'}"]))
    inputs = again.tokenizer("cold and late", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ours = again.model.eval()(**inputs).logits.softmax(-1)[0]
    assert theirs == pytest.approx(dict(zip(("bad", "fair", "good"), ours.tolist(), strict=True)), abs=1e-3)


def test_every_trained_weight_gets_a_gradient_and_the_head_is_trained_whole(tmp_path: Path) -> None:
    model = runs.loaded([*TINY, f"data.path='{labelled(tmp_path)}'"]).model
    runs.shake(model, trainable_only=True)
    ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.any()] == []


def test_what_a_checkpoint_did_not_bring_is_saved_with_the_adapter(tmp_path: Path) -> None:
    """A head that started at random would start elsewhere when the adapter is loaded again."""
    path = labelled(tmp_path)
    for family, heads in (("modernbert", {"head", "classifier"}), ("bert", {"classifier", "bert.pooler"})):
        folder = tmp_path / family
        bare: Any = runs.loaded([f"+model={family}", "model.tiny=true", "model.dtype=float32", "adapter=full"])
        bare.model.save_pretrained(folder)
        bare.tokenizer.save_pretrained(folder)
        words = [f"+model={family}", f"model.path='{folder}'", "model.dtype=float32", "+trainer=classify"]
        model = runs.loaded([*words, f"data.path='{path}'"]).model
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        saved = {name.partition(".modules_to_save.")[0] for name in trained if ".modules_to_save." in name}
        assert saved == {f"base_model.model.{name}" for name in heads}
        assert not [name for name in trained if "lora_" in name and any(f"model.{head}." in name for head in heads)]


def test_order_of_the_classes() -> None:
    """Numbers by value, names by the alphabet; a number is a place in the list that the user gives."""
    from ftcore_trainers._classes import index, name_of

    assert [name_of(label) for label in (True, 3, 3.0, " good ", "10")] == ["true", "3", "3", "good", "10"]
    assert [index(label, ["no", "yes"]) for label in ("yes", 1, "0", "maybe", 2)] == [1, 1, 0, None, None]
    assert index(2, ["2", "0", "1"]) == 0  # a class of that name comes before the place


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 2], ["2", "9", "10"]),
        ([1, -1, 0, -10], ["-10", "-1", "0", "1"]),
        (["²", "b", "a"], ["a", "b", "²"]),
        (["b", "a", "b"], ["a", "b"]),
        ([True, False], ["false", "true"]),
    ],
)
def test_classes_in_the_plan(labels: list[Any], classes: list[str], tmp_path: Path) -> None:
    path = labelled(tmp_path, [(f"text {n}", label) for n, label in enumerate(labels)])
    _, plan = runs.prepared([*TINY, f"data.path='{path}'"])
    trainer: Any = plan.run.trainer
    assert trainer.labels == classes
    assert plan.family.settings["id2label"] == dict(enumerate(classes))


def test_several_classes_a_row(tmp_path: Path) -> None:
    path = labelled(
        tmp_path, [("warm soup", ["food", "warm"]), ("cold room", ["room"]), ("nothing", []), ("x", ["food"])]
    )
    words = [*TINY, *SHORT, f"data.path='{path}'", f"data.eval_path='{path}'"]
    result = run([*words, f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    model: Any = load_trained(config_of([f"run={tmp_path / 'run'}"])).model
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.id2label.values()) == ["food", "room", "warm"]


def test_pairs_of_texts_and_token_types(tmp_path: Path) -> None:
    rows = [
        {"premise": "it rains", "hypothesis": h, "label": i % 2} for i, h in enumerate(("wet", "dry", "wet", "sun"))
    ]
    path = written(tmp_path, rows)
    metrics = run(
        ["+model=bert", *TINY[1:], *SHORT, f"data.path='{path}'", f"output_dir='{tmp_path / 'run'}'", "data=labels"]
    ).metrics
    assert metrics["loss_last"] < metrics["loss_first"]


def test_a_decoder_classifies_as_well(tmp_path: Path) -> None:
    path = labelled(tmp_path)
    words = ["+model=llama", *TINY[1:], *SHORT, f"data.path='{path}'", f"data.eval_path='{path}'"]
    metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    """A head's loss is a mean; a step of two micro-batches must not be twice as large."""
    norms = []
    for micro in (4, 2):
        path = labelled(tmp_path)
        words = [*TINY, f"data.path='{path}'", "trainer.max_steps=1", "trainer.global_batch=4"]
        folder = tmp_path / f"run{micro}"
        run([*words, f"trainer.micro_batch={micro}", f"output_dir='{folder}'"])
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        norms.append((logged[0]["loss"], logged[0]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_mistakes_are_told_before_weights_load(tmp_path: Path) -> None:
    path = labelled(tmp_path)
    assert "label 'bad' is none of trainer.labels: 'good', 'fair'" in refused(
        f"data.path='{path}'", "trainer.labels=[good,fair]"
    )
    assert "rows.jsonl:2" in refused(f"data.path='{path}'", "trainer.labels=[good,fair]")
    renamed = written(tmp_path, [{"text": "a", "kind": "b"}], "renamed.jsonl")
    assert "has no column 'label'" in refused(f"data.path='{renamed}'", "data=labels")
    alone = labelled(tmp_path, [("a", "x"), ("b", "x")], "alone.jsonl")
    assert "there is only one class, 'x'" in refused(f"data.path='{alone}'")
    scores = labelled(tmp_path, [("a", 0.3), ("b", 0.8)], "scores.jsonl")
    assert "label 0.3 is a quantity, not a class" in refused(f"data.path='{scores}'")
    texts = labelled(tmp_path, [(f"a {n}", f"its own {n}") for n in range(20)], "texts.jsonl")
    assert "20 rows have 20 classes" in refused(f"data.path='{texts}'")
    assert "trainer.labels: names 'good' twice" in refused(f"data.path='{path}'", "trainer.labels=[good,good]")
    assert "prompts: classify trains no model that answers" in refused(f"data.path='{path}'", "prompts=[hi]")
    assert "trainer.packing" in refused(f"data.path='{path}'", "trainer.packing=true")
    plain = written(tmp_path, [{"text": "only text"}], "plain.jsonl")
    assert "plain.jsonl:1: has no column 'label'" in refused(f"data.path='{plain}'")
    assert "text rows have the shape 'text', but classify takes labels" in refused(f"data.path='{plain}'", "data=text")


def test_a_family_without_the_head_is_refused(tmp_path: Path) -> None:
    problems = runs.refusals(["+model=whisper", *TINY[1:], f"data.path='{labelled(tmp_path)}'"])
    assert any("transformers has no AutoModelForSequenceClassification of whisper" in p.message for p in problems)


def test_a_checkpoint_with_other_classes_is_refused_and_one_with_these_keeps_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    model = runs.loaded([*TINY, f"data.path='{labelled(tmp_path)}'", "adapter=full"])
    whole: Any = model.model
    whole.config.id2label = {0: "good", 1: "bad", 2: "fair"}
    whole.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    words = ["+model=modernbert", f"model.path='{folder}'", "model.dtype=float32", "+trainer=classify"]
    _, plan = runs.prepared([*words, f"data.path='{labelled(tmp_path)}'"])
    trainer: Any = plan.run.trainer
    assert trainer.labels == ["good", "bad", "fair"]
    two = labelled(tmp_path, [("a", "x"), ("b", "y")], "two.jsonl")
    problems = runs.refusals([*words, f"data.path='{two}'"])
    assert [problem.key for problem in problems] == ["trainer.labels"]
    assert "trained for 3: 'good', 'bad', 'fair'" in problems[0].message


def test_an_adapter_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    """Held-out rows may name a part of them, in whatever order: a head knows numbers alone."""
    path, folder = labelled(tmp_path), tmp_path / "run"
    words = [*TINY, *SHORT, f"data.path='{path}'", f"data.eval_path='{path}'", "trainer.labels=[good,bad,fair]"]
    result = run([*words, "+export=[adapter]", f"output_dir='{folder}'"])
    part = labelled(tmp_path, [("a", "fair"), ("b", "bad")], "part.jsonl")
    two = labelled(tmp_path, [("a", "x"), ("b", "y")], "two.jsonl")
    for adapter in (folder / "trained", folder / "export" / "adapter"):
        on = f"adapter.path='{adapter}'"
        _, plan = runs.prepared([*TINY, f"data.path='{part}'", on])
        trainer: Any = plan.run.trainer
        assert trainer.labels == ["good", "bad", "fair"]
        assert "the adapter was trained for 3: 'good', 'bad', 'fair'" in refused(f"data.path='{two}'", on)
        assert "has another order" in refused(f"data.path='{path}'", on, "trainer.labels=[bad,fair,good]")
    onward = [*TINY, *SHORT, f"data.path='{path}'", f"data.eval_path='{path}'", on, f"output_dir='{tmp_path / 'on'}'"]
    assert run(onward).metrics["eval_loss_before"] == pytest.approx(result.metrics["eval_loss"], abs=1e-4)


def test_an_adapter_with_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    """One that names no classes, such as a reward model's, is known by its weights alone."""
    folder = tmp_path / "run"
    run([*TINY, *SHORT, f"data.path='{labelled(tmp_path)}'", f"output_dir='{folder}'"])
    (folder / "trained" / "classes.json").unlink()
    two = labelled(tmp_path, [("a", "x"), ("b", "y")], "two.jsonl")
    with pytest.raises(Refused, match=r"of another head: size mismatch for .*classifier"):
        runs.loaded([*TINY, f"data.path='{two}'", f"adapter.path='{folder / 'trained'}'"])


def test_labels_of_several_classes_are_not_smoothed(tmp_path: Path) -> None:
    """transformers leaves the setting out there, with a warning that nobody sees."""
    several, smooth = labelled(tmp_path, [("a", ["x", "y"]), ("b", ["y"])]), "trainer.args.label_smoothing_factor=0.1"
    assert "trainer.args.label_smoothing_factor" in refused(f"data.path='{several}'", smooth)
    one = labelled(tmp_path, name="one.jsonl")
    assert runs.refusals([*TINY, f"data.path='{one}'", smooth]) == ()


def test_the_same_command_goes_on_with_the_classes_that_it_found(in_tmp: Path, capsys: Any) -> None:
    """The record has them, and the command does not."""
    from ftcore.cli import run as command

    words = [*TINY, *SHORT, f"data.path='{labelled(in_tmp)}'", "trainer.save_steps=1"]
    assert command(words) == 0
    (folder,) = Path("runs").iterdir()
    shutil.rmtree(folder / "trained")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))
    assert command([*words, "trainer.labels=[good,bad,fair]"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert command(words) == 0
    assert f"going on with {folder} after step 2" in capsys.readouterr().out


def test_a_plan_of_the_tiny_model() -> None:
    """Its shape is known without its weights: the padding token lies in the vocabulary."""
    assert on_meta(*runs.prepared([*TINY]))[0].config.pad_token_id == 256


def test_accuracy_and_macro_f1() -> None:
    """By hand: class 0 has 2 of 3 right and one too many, class 1 half, class 2 is never right."""
    true, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 1])
    assert accuracy(predicted, true) == pytest.approx(3 / 6)
    assert macro_f1(predicted, true) == pytest.approx((4 / 6 + 2 / 5 + 0) / 3)
    several, wanted = np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]])
    assert accuracy(several, wanted) == 0.5
    assert macro_f1(several, wanted) == pytest.approx((2 / 3 + 1) / 2)


def test_rows_that_no_plan_has_seen_have_no_classes_beyond_the_first(tmp_path: Path) -> None:
    from ftcore_trainers._classes import LabelledTexts

    def encode(texts: Sequence[str], pairs: Any = None) -> dict[str, Any]:
        return {"input_ids": torch.zeros(len(texts), 1)}

    one = LabelledTexts(encode, ["a", "b"], several=False)
    assert one([{"text": "x", "label": "b"}])["labels"].tolist() == [1]
    for label in (["a", "b"], []):
        with pytest.raises(Refused, match=r"trainer\.multi_label"):
            one([{"text": "x", "label": label}])
