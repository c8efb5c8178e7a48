"""`model.new_tokens`: in the tokenizer, in the embedding and the head, trained, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ftcore
from ftcore import hooks as h
from ftcore import pipeline
from ftcore.composition import compose, typed
from ftcore.errors import Refused

TOKENS = ("<think>", "</think>")
NEW = 'model.new_tokens=["<think>","</think>"]'
TIED, UNTIED = "+model=smollm2", "+model=mistral"
FEW = ("trainer.max_steps=3", "trainer.global_batch=2", "trainer.max_length=128", "trainer.learning_rate=0.01")


def loaded(*words: str) -> Any:
    hooks, plan = pipeline.prepare(typed(compose([*words, "model.tiny=true", "+trainer=sft"])))
    return pipeline.load(hooks, plan)


def tables(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def rows(path: Path) -> str:
    answer = "<think>a</think>b"
    talk = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": answer}]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(4)))
    return f"data.path={path}"


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_new_rows_are_the_mean_of_the_others(family: str) -> None:
    before, after = loaded(family, "adapter=full"), loaded(family, "adapter=full", NEW)
    tokenizer, known = after.tokenizer, len(before.tokenizer)
    assert len(tokenizer) == known + 2
    ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
    assert tokenizer("a<think>b")["input_ids"][1] == ids[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think>"
    for old, new in zip(tables(before.model), tables(after.model), strict=True):
        assert new.shape[0] == after.model.config.vocab_size == known + 2
        assert torch.equal(new[:known], old)
        assert torch.allclose(new[ids], old.float().mean(dim=0).expand(2, -1).to(new.dtype))
    tied = [
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
        for model in (before.model, after.model)
    ]
    assert tied == [family == TIED] * 2


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_lora_trains_only_the_new_rows_and_the_merged_model_says_the_same(family: str, in_tmp: Path) -> None:
    words = [family, "model.tiny=true", "+trainer=sft", NEW, rows(in_tmp / "rows.jsonl"), *FEW]
    result = ftcore.run([*words, "+export=[safetensors,adapter]", "output_dir=out"])
    assert result.metrics["loss_last"] < result.metrics["loss_first"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = loaded(family, "adapter=full", NEW)
    tokenizer = AutoTokenizer.from_pretrained("out/export/safetensors")
    assert tokenizer.get_vocab() == base.tokenizer.get_vocab()
    ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
    merged = AutoModelForCausalLM.from_pretrained("out/export/safetensors", dtype=torch.float32)
    for old, new in zip(tables(base.model), tables(merged), strict=True):
        moved = (old.float() - new.float()).abs().amax(dim=1) > 1e-3
        assert sorted(moved.nonzero().flatten().tolist()) == sorted(ids)
    assert merged.config.tie_word_embeddings == (family == TIED)
    # The trained adapter on the base model, as `ftcore chat` and later exports load it, is the same model.
    hooks, plan = pipeline.prepare(typed(compose([*words, "adapter.path=out/export/adapter"])))
    adapted = pipeline.load(hooks, plan).model.eval()
    text = tokenizer("Go<think>a</think>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        one, other = adapted(input_ids=text).logits.float(), merged(input_ids=text).logits
    assert torch.allclose(one, other, atol=2e-2)


def test_full_fine_tuning_keeps_them(in_tmp: Path) -> None:
    words = [TIED, "model.tiny=true", "adapter=full", "+trainer=sft", NEW, rows(in_tmp / "rows.jsonl"), *FEW]
    ftcore.run([*words, "output_dir=out", "+export=[safetensors]"])
    from transformers import AutoModelForCausalLM

    first = loaded(TIED, "adapter=full", NEW).model
    saved = AutoModelForCausalLM.from_pretrained("out/export/safetensors", dtype=torch.float32)
    assert saved.config.vocab_size == first.config.vocab_size
    ids = list(range(first.config.vocab_size - 2, first.config.vocab_size))
    assert not torch.allclose(tables(saved)[0][ids], tables(first)[0][ids].float(), atol=1e-3)
    # Tokens that a checkpoint has already are not begun anew.
    hooks, plan = pipeline.prepare(
        typed(compose([TIED, "model.path=out/export/safetensors", "adapter=full", "+trainer=sft", NEW]))
    )
    again = pipeline.load(hooks, plan).model
    assert torch.allclose(tables(again)[0].float(), tables(saved)[0], atol=1e-6)


def test_the_plan_counts_them_and_rows_use_them(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcore import cli

    words = [TIED, "model.tiny=true", "+trainer=sft", NEW, rows(in_tmp / "rows.jsonl")]
    assert cli.run(["plan", *words]) == 0
    hooks, plan = pipeline.prepare(typed(compose(words)))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    made = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)["train"]
    assert [label for label in made[0]["labels"] if label in tokenizer.convert_tokens_to_ids(list(TOKENS))] == [
        259,
        260,
    ]


@pytest.mark.parametrize(
    ("words", "reason"), [('["a","a"]', "'a' is there 2 times"), ('[" "]', "is empty"), ('["a "]', "white space")]
)
def test_bad_tokens_are_refused(words: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        loaded(TIED, f"model.new_tokens={words}")


@pytest.mark.parametrize("one", ["lm_head", "embed_tokens"])
def test_one_half_of_a_tied_table_is_not_trained_whole(one: str) -> None:
    with pytest.raises(Refused, match=r"embed_tokens and lm_head are one table") as found:
        loaded(TIED, NEW, f"adapter.modules_to_save=[{one}]")
    assert "modules_to_save=[embed_tokens,lm_head]" in found.value.problems[0].fix
    assert loaded(TIED, NEW, "adapter.modules_to_save=[embed_tokens,lm_head]").model
    assert loaded(UNTIED, NEW, f"adapter.modules_to_save=[{one}]").model


def test_tables_that_do_not_grow_together_are_refused() -> None:
    with pytest.raises(Refused, match=r"do not grow together"):
        loaded("+model=mllama", NEW)
