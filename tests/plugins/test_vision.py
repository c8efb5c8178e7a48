"""Rows with images: their tokens, their batches, what is trained of the model, and what wrong rows end in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import ftcore
from ftcore import Refused, checkpoint
from ftcore import hooks as h
from ftcore.mismatches import mismatches
from ftcore.tasks.preview import pieces
from ftcore.testing import maths, runs
from ftcore.vision import ImageRowTokenizer, opened, processor_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "gemma3_vision", "qwen3_vl", "mllama", "pixtral")
TOWERS = {"gemma3_vision": "vision_tower", "pixtral": "vision_tower", "mllama": "vision_model"}
SIZES = ((64, 96), (130, 40), (32, 32))
ANSWER = "It is noise."


def tiny(family: str) -> list[str]:
    return [f"+model={family}", "model.tiny=true", "model.dtype=float32"]


def parts_of(family: str) -> tuple[Any, Any, Any]:
    """Plan, tokenizer and collator of an SFT run on images."""
    hooks, plan = runs.prepared([*tiny(family), "data=images", "+trainer=sft"])
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    return plan, tokenizer, hooks.first(h.ftcore_make_collator, plan=plan, tokenizer=tokenizer)


def tokens_of(family: str, *rows: dict[str, Any], max_length: int = 1000) -> list[dict[str, Any]]:
    plan, tokenizer, _ = parts_of(family)
    tokenize = ImageRowTokenizer(tokenizer, plan.family.vision, max_length)
    return [made for row in rows for made in tokenize(row)]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    """Rows beside a folder with three pictures."""
    (folder / "media").mkdir()
    for name, size in zip("abc", SIZES, strict=True):
        runs.noise(*size).save(folder / "media" / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def row(*images: str, words: str = "What is this?") -> dict[str, Any]:
    talk = [{"role": "user", "content": words}, {"role": "assistant", "content": ANSWER}]
    return {"images": [f"media/{name}.png" for name in images], "messages": talk}


GOOD = [row("a"), row("b", "c"), row("c"), row("a", words="Look: <image>\nWhat is this?")]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_batches_are_those_of_the_processor(family: str) -> None:
    """Of every input, pixel values and masks included: what generation would be given for the same conversations."""
    _, tokenizer, collate = parts_of(family)
    rows = [runs.row_with_images(*sizes, answer=ANSWER) for sizes in (SIZES[:1], SIZES[1:2])]
    ours = collate(tokens_of(family, *rows))
    texts = [tokenizer.apply_chat_template(one["messages"], tokenize=False) for one in rows]
    processor = processor_of(tokenizer)
    nested = family in ("gemma3_vision", "mllama")
    images = [one["images"] if nested else one["images"][0] for one in rows]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
    theirs = dict(processor(images=images, text=texts, **options))
    theirs.pop("token_type_ids", None) if family == "pixtral" else None
    assert ours.keys() - {"labels"} == theirs.keys()
    at = ours["attention_mask"].bool()
    for name, value in theirs.items():
        mine = ours[name]
        if name == "cross_attention_mask":  # what a pad sees means nothing
            mine, value = mine[at], value[at]
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(value), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_and_its_own_tokenizer_fit(family: str) -> None:
    """Also where the token of images lies beyond the vocabulary, as in Llama 3.2 Vision: the embedding has its row."""
    plan, _, _ = parts_of(family)
    folder = checkpoint.locate(plan.run.model, plan.family)
    hooks, plan = runs.prepared([f"+model={family}", f"model.path='{folder}'", "data=images", "+trainer=sft"])
    assert mismatches(plan, hooks.first(h.ftcore_load_tokenizer, plan=plan)) == []


def test_pixtral_closes_each_row_of_patches() -> None:
    """By transformers' own rule: as many tokens in a row as patches of 16 pixels, and another mark at the end."""
    made = tokens_of("pixtral", runs.row_with_images((48, 32)))[0]["input_ids"]
    image, closed, end = 259, 260, 261
    assert [token for token in made if token >= image] == [image] * 3 + [closed] + [image] * 3 + [end]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answers_words_are_trained(family: str) -> None:
    _, tokenizer, _ = parts_of(family)
    (made,) = tokens_of(family, runs.row_with_images(*SIZES, answer=ANSWER))
    trained = [text for text, is_trained in pieces(made["input_ids"], made["labels"], tokenizer) if is_trained]
    assert trained == [f"{ANSWER}<|im_end|>"]
    assert len(made["pictures"]) == len(SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_an_answer_are_read_and_not_trained(family: str) -> None:
    plan, tokenizer, _ = parts_of(family)
    one = runs.row_with_images(SIZES[2])
    like, so = ({"type": "text", "text": text} for text in ("Like", "so."))
    one["messages"][1]["content"] = [like, {"type": "image"}, so]
    one["images"] *= 2
    (made,) = tokens_of(family, one)
    marks = set(tokenizer.convert_tokens_to_ids(list(plan.family.vision.tokens)))
    trained = {label for label in made["labels"] if label != -100}
    assert marks & set(made["input_ids"])
    assert not marks & trained
    text = tokenizer.decode([label for label in made["labels"] if label != -100])
    assert text.replace("\n", "") == "Likeso.<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_look_like_a_mark_stay_words(family: str) -> None:
    plan, tokenizer, _ = parts_of(family)
    one, same = runs.row_with_images(SIZES[2]), runs.row_with_images(SIZES[2])
    one["messages"][0]["content"][-1]["text"] += f" {plan.family.vision.mark}"
    made, plain = tokens_of(family, one, same)
    token = tokenizer.convert_tokens_to_ids(plan.family.vision.image)
    assert made["input_ids"].count(token) == plain["input_ids"].count(token)
    assert len(made["input_ids"]) == len(plain["input_ids"]) + 1 + len(plan.family.vision.mark)


def test_an_image_beyond_the_longest_row_is_refused() -> None:
    with pytest.raises(Refused, match=r"an image lies beyond trainer\.max_length=8"):
        tokens_of("qwen2_vl", runs.row_with_images(SIZES[0]), max_length=8)


def test_a_template_without_places_is_refused() -> None:
    plan, tokenizer, _ = parts_of("qwen2_vl")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|>", "")
    with pytest.raises(Refused, match="gives 0 places to 1 images"):
        ImageRowTokenizer(tokenizer, plan.family.vision, 1000)(runs.row_with_images(SIZES[0]))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "qwen2_5_vl" else pytest.mark.slow) for f in FAMILIES]
)
def test_a_run_on_rows_with_paths_learns_and_its_exports_load(family: str, tmp_path: Path) -> None:
    """Three steps, a lower loss, and the merged model and the adapter say what the trained model says of an image."""
    file = write(tmp_path, *GOOD)
    words = [*tiny(family), "+trainer=sft", f"data.path='{file}'", f"data.eval_path='{file}'", "trainer.max_steps=3"]
    words += ["trainer.global_batch=2", "+export=[adapter,safetensors]", "export.safetensors.dtype=float32"]
    result = ftcore.run([*words, f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]

    trained = runs.reloaded(words, str(tmp_path / "run"))
    batch = runs.batch_with_images(tiny(family))
    said = runs.logits_of(trained.model, batch)
    plain = runs.loaded([*tiny(family), "adapter=full", "kernels=[]"])
    assert maths.apart(runs.logits_of(plain.model, batch), said) > 1e-4

    folder = tmp_path / "run" / "export" / "safetensors"
    merged = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert maths.apart(runs.logits_of(merged, batch), said) < 1e-5
    again = runs.loaded([f"+model={family}", f"model.path='{folder}'", "adapter=full", "kernels=[]"])
    ours, theirs = processor_of(again.tokenizer), processor_of(trained.tokenizer)
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert again.tokenizer.chat_template == trained.tokenizer.chat_template

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(plain.model, str(tmp_path / "run" / "export" / "adapter"))
    assert maths.apart(runs.logits_of(adapted, batch), said) < 1e-5


@pytest.mark.few
@pytest.mark.parametrize("adapter", ["adapter=full", "adapter.parts=[vision]"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_towers_weights_learn_too(family: str, adapter: str) -> None:
    loaded = runs.loaded([*tiny(family), adapter])
    model: Any = loaded.model
    runs.shake(model, trainable_only=True)
    _, gradients = maths.loss_and_gradients(model, runs.batch_with_images(tiny(family)))
    tower = {name: g for name, g in gradients.items() if TOWERS.get(family, "visual") in name}
    assert tower
    assert all(g.isfinite().all() and g.any() for name, g in tower.items() if not name.endswith("k_proj.bias"))


@pytest.mark.few
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("parts", "sides", "kinds"),
    [
        ([], {"vision", "language"}, {"attention", "mlp"}),
        (["vision"], {"vision"}, {"attention", "mlp"}),
        (["language"], {"language"}, {"attention", "mlp"}),
        (["attention"], {"vision", "language"}, {"attention"}),
        (["language", "mlp"], {"language"}, {"mlp"}),
    ],
)
def test_parts_choose_what_is_trained(family: str, parts: list[str], sides: set[str], kinds: set[str]) -> None:
    model: Any = runs.loaded([*tiny(family), f"adapter.parts=[{','.join(parts)}]"]).model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    tower = TOWERS.get(family, "visual")
    assert {"vision" if f".{tower}." in name else "language" for name in names} == sides
    of_mlp = ("mlp.", "feed_forward.")
    assert {"mlp" if any(part in name for part in of_mlp) else "attention" for name in names} == kinds


WRONG = {
    "missing": (row("nowhere"), "there is no file media/nowhere.png"),
    "marks": (row("a", words="<image> and <image>"), "has 1 images and 2 places for them"),
    "no image": (row("d"), "media/d.png is no image"),
    "cut off": (row("e"), "media/e.png is no image that can be read"),
    "empty": (row(), "column 'images' is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_end_in_one_message_with_file_and_line(case: str, tmp_path: Path) -> None:
    wrong, reason = WRONG[case]
    file = write(tmp_path, row("a"), wrong)
    (tmp_path / "media" / "d.png").write_text("words")
    (tmp_path / "media" / "e.png").write_bytes((tmp_path / "media" / "a.png").read_bytes()[:200])
    problems = runs.refusals([*tiny("qwen2_vl"), "+trainer=sft", "data=images", f"data.path='{file}'"])
    assert [problem.key for problem in problems] == [f"{file}:2"]
    assert reason in problems[0].message
    assert problems[0].fix


REFUSED = {
    "packing": (["+model=pixtral", "trainer.packing=true"], {"trainer.packing"}),
    "model": (["+model=llama"], {"data"}),
    "part": (["+model=qwen2_vl", "adapter.parts=[visoin]"], {"adapter.parts"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_the_plan(case: str) -> None:
    words, keys = REFUSED[case]
    problems = runs.refusals([*words, "model.tiny=true", "+trainer=sft", "data=images"])
    assert {problem.key for problem in problems} == keys
    assert all(problem.message and problem.fix for problem in problems)


def test_parts_of_a_text_model_are_refused() -> None:
    problems = runs.refusals(["+model=llama", "model.tiny=true", "adapter.parts=[language]"])
    assert [problem.key for problem in problems] == ["adapter.parts"]


def test_other_towers_of_llavas_type_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = runs.refusals(["+model=pixtral", f"model.path='{tmp_path}'"])
    assert [problem.message for problem in problems] == [
        "its tower is 'clip_vision_model', and this family is Llava's with a 'pixtral' tower"
    ]


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "pictures"])
def test_parquet_with_bytes_or_pictures_is_trained(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    pictures = [runs.noise(*size) for size in SIZES]
    images = [[{"bytes": png(p), "path": None}] for p in pictures] if kind == "bytes" else [[p] for p in pictures]
    talk = row()["messages"]
    Dataset.from_dict({"images": images, "messages": [talk] * 3}).to_parquet(tmp_path / "rows.parquet")
    words = [*tiny("qwen2_vl"), "+trainer=sft", f"data.path='{tmp_path / 'rows.parquet'}'", "trainer.max_steps=2"]
    result = ftcore.run([*words, "trainer.global_batch=2", f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["loss_last"] < result.metrics["loss_first"]


def test_a_stream_of_paths_and_bytes_is_trained(tmp_path: Path) -> None:
    from datasets import Dataset

    file = write(tmp_path, *GOOD)
    paths = [{"path": str(tmp_path / "media" / "a.png"), "bytes": None}] * 101  # more than are converted at a time
    held = [{"path": None, "bytes": (tmp_path / "media" / "b.png").read_bytes()}] * 3
    rows = {"images": [[one] for one in (*paths, *held)], "messages": [row()["messages"]] * 104}
    Dataset.from_dict(rows).to_parquet(tmp_path / "mixed.parquet")
    stream, mixed = ["data.streaming=true", f"data.path='{file}'"], [f"data.path='{tmp_path / 'mixed.parquet'}'"]
    for number, words in enumerate((stream, mixed)):
        run = [*tiny("qwen2_vl"), "+trainer=sft", *words, "trainer.max_steps=2", "trainer.global_batch=2"]
        result = ftcore.run([*run, f"output_dir='{tmp_path / str(number)}'"])
        assert result.metrics["loss_last"] < result.metrics["loss_first"]


def test_images_are_read_as_cameras_held_them(tmp_path: Path) -> None:
    """In RGB, turned by what EXIF says, the same from a path and from bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    runs.noise(64, 96).convert("L").save(tmp_path / "a.png", exif=exif)
    for source in (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert (opened(source).size, opened(source).mode) == ((96, 64), "RGB")


def test_preview_shows_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcore.tasks.preview import main

    file = write(tmp_path, *GOOD)
    main([*tiny("qwen2_vl"), "+trainer=sft", f"data.path='{file}'", "preview.rows=1"])
    out = capsys.readouterr().out
    assert f"[[{ANSWER}<|im_end|>]]" in out
    assert out.count("<|image_pad|>") == 6  # 64 x 96 pixels become 2 x 3 patches of 28


def test_an_image_that_the_model_does_not_read_is_said_of_its_row(tmp_path: Path) -> None:
    file = write(tmp_path, row("a"), row("line"))
    Image.new("RGB", (2000, 8)).save(tmp_path / "media" / "line.png")
    words = [
        *tiny("qwen2_vl"),
        "+trainer=sft",
        "data=images",
        f"data.path='{file}'",
        f"output_dir='{tmp_path / 'run'}'",
    ]
    with pytest.raises(Refused, match=r"does not read an image of 2000 x 8 pixels") as found:
        ftcore.run(words)
    assert found.value.problems[0].key == f"{file}:2"
