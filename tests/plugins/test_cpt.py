"""Continued pre-training: every token of a text, packed, and without the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore import hooks as h
from ftcore.answers import Answers
from ftcore.api import run
from ftcore.config import SamplingConfig
from ftcore.testing import runs
from ftcore.testing.trainer import Watched
from ftcore.tokens import RowTokenizer
from ftcore_generators.transformers import TransformersGenerator

TINY = ("+model=llama", "model.tiny=true", "model.dtype=float32", "+trainer=cpt")
LONG = "It was a dark and stormy night; the rain fell in torrents. " * 9


def rows_file(folder: Path, *texts: str) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    return f"data.path={file}"


def formatted(*words: str) -> list[dict[str, Any]]:
    hooks, plan = runs.prepared([*TINY, *words])
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    dataset = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)
    return list(dataset["train"])


def test_a_long_text_is_split_and_nothing_of_it_is_lost(in_tmp: Path) -> None:
    hooks, plan = runs.prepared([*TINY])
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    (whole,) = RowTokenizer(tokenizer, "text", 10_000)({"text": LONG})
    rows = formatted(rows_file(in_tmp, LONG), "trainer.max_length=100")
    assert len(rows) == -(-len(whole["input_ids"]) // 100)
    assert {len(row["input_ids"]) for row in rows[:-1]} == {100}
    for column in ("input_ids", "labels"):
        assert [token for row in rows for token in row[column]] == whole[column]
    assert all(row["input_ids"] == row["labels"] for row in rows)
    assert whole["input_ids"][-1] == tokenizer.eos_token_id


def test_sft_cuts_a_long_text_off(in_tmp: Path) -> None:
    words = ["+model=llama", "model.tiny=true", "+trainer=sft", rows_file(in_tmp, LONG), "trainer.max_length=100"]
    hooks, plan = runs.prepared(words)
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    dataset = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)
    assert [len(row["input_ids"]) for row in dataset["train"]] == [100]


def test_texts_are_packed_and_start_anew_within_a_row(in_tmp: Path) -> None:
    watched = Watched()
    texts = [f"Text number {number} is short." for number in range(40)]
    words = [rows_file(in_tmp, *texts), "trainer.max_length=128", "trainer.max_steps=1", "trainer.global_batch=2"]
    run([*TINY, *words], plugins=[watched])
    assert watched.trainer.args.packing
    batch = next(iter(watched.trainer.get_train_dataloader()))
    positions = batch["position_ids"].flatten().tolist()
    assert positions.count(0) > 4, "several texts, each with positions of its own"
    assert len(watched.trainer.train_dataset) < len(texts)


def test_prompts_are_continued_without_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = runs.loaded(["+model=smollm2", *TINY[1:]])
    tokenizer, asked = loaded.tokenizer, []
    assert tokenizer.chat_template
    generator = TransformersGenerator(loaded.model, tokenizer, batch=1)
    generate = generator.generate
    monkeypatch.setattr(generator, "generate", lambda ids, sampling: asked.extend(ids) or generate(ids, sampling))
    answers = Answers(generator, loaded.model, tokenizer, SamplingConfig(max_new_tokens=2))
    answers.to(["Once upon"], continues=True)
    answers.to(["Once upon"])
    plain, turn = (tokenizer.decode(ids) for ids in asked)
    assert plain == "Once upon"
    assert "user" in turn
    assert loaded.plan.trainer is not None
    assert loaded.plan.trainer.continues


def test_a_family_that_cannot_pack_says_what_to_do(in_tmp: Path) -> None:
    words = ["+model=lfm2", "model.tiny=true", "+trainer=cpt"]
    (problem,) = runs.refusals(words)
    assert (problem.key, problem.fix) == ("trainer.packing", "use trainer.packing=false")
    assert runs.refusals([*words, problem.fix.removeprefix("use ")]) == ()


def test_conversations_are_refused(in_tmp: Path) -> None:
    (problem,) = runs.refusals([*TINY, "data=messages"])
    assert problem.key == "data"
    assert "cpt takes text, tokens" in problem.message
    assert "data=text" in problem.fix
