"""Packed rows train as the same documents do in rows of their own, and batches are filled up to few lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import ftcore
from ftcore.testing import maths, runs
from ftcore_trainers._buckets import Buckets, contexts, rounded_up
from ftcore_trainers._collator import WithoutMask

LENGTHS = (65, 1, 129, 63, 128, 2, 64, 127, 1)
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "mistral", "gemma2")


def rows(lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Documents whose first third has no label, as prompts have none."""
    drawn = torch.Generator().manual_seed(6)
    made = [torch.randint(3, 250, (length,), generator=drawn).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in made]


def collated(documents: list[dict[str, Any]], packed: bool, tokens: float = 0) -> dict[str, Any]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    batch = WithoutMask(collate, Buckets(tokens, 0) if tokens else None)(documents)
    del batch["num_tokens"]
    return batch


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Any:
    words = [f"+model={request.param}", "model.tiny=true", "model.dtype=float32", "kernels=[auto]", "adapter=full"]
    loaded = runs.loaded(words)
    assert loaded.patches.counts()[("decoder_layer", f"{_set()}.decoder_layer")] == 2
    runs.shake(loaded.model)
    return loaded.model


def _set() -> str:
    return "triton" if torch.cuda.is_available() else "reference"


def on(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}


def summed(model: Any, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss over all labels of several batches, and its gradients."""
    model.train()
    model.zero_grad()
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    losses = []
    for batch in batches:
        loss = model(**on(model, batch), num_items_in_batch=torch.tensor(labels)).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum(), gradients


def assert_same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    assert maths.apart(one[0], other[0]) <= tolerance
    assert set(one[1]) == set(other[1])
    assert all(gradient.any() for gradient in one[1].values())
    far = {name: away for name in one[1] if not (away := maths.apart(one[1][name], other[1][name])) <= tolerance}
    assert not far


@pytest.mark.few
@pytest.mark.parametrize("tokens", [0, 1e9], ids=["as long as it is", "filled up"])
def test_packed_is_separate(model, tokens) -> None:
    packed = collated(rows(), True, tokens)
    assert packed["input_ids"].shape == (1, rounded_up(sum(LENGTHS)) if tokens else sum(LENGTHS))
    # A document of one token has no label that counts, and a mean over none is not a number.
    separate = [collated([row], False, tokens) for row in rows() if len(row["input_ids"]) > 1]
    assert_same(summed(model, [packed]), summed(model, separate))


@pytest.mark.few
@pytest.mark.parametrize("tokens", [0, 1e9], ids=["as long as it is", "filled up"])
def test_padded_is_separate(model, tokens) -> None:
    documents = [row for row in rows() if len(row["input_ids"]) > 1]
    assert_same(
        summed(model, [collated(documents, False, tokens)]),
        summed(model, [collated([row], False) for row in documents]),
    )


def hidden(model: Any, documents: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What the decoder makes of packed documents, each by itself."""
    batch = on(model, collated(documents, True))
    del batch["labels"]
    with torch.no_grad():
        out = model.eval().base_model(**batch, use_cache=False).last_hidden_state[0]
    return list(out.split([len(row["input_ids"]) for row in documents]))


@pytest.mark.few
@pytest.mark.parametrize("changed", [0, 2, 5, len(LENGTHS) - 1])
def test_a_changed_document_leaves_the_others(model, changed) -> None:
    documents = rows()
    before = hidden(model, documents)
    documents[changed] = {**documents[changed], "input_ids": [7] * LENGTHS[changed]}
    after = hidden(model, documents)
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [index != changed for index in range(len(LENGTHS))]


def test_documents_in_another_order(model) -> None:
    order = [4, 8, 0, 3, 7, 1, 6, 2, 5]
    documents = rows()
    expected, found = hidden(model, documents), hidden(model, [documents[index] for index in order])
    for place, index in enumerate(order):
        torch.testing.assert_close(found[place], expected[index], rtol=1e-4, atol=1e-4)


# Lengths ------------------------------------------------------------------------------------------------------------


def test_lengths_are_few_and_waste_little() -> None:
    lengths = [rounded_up(length) for length in range(1, 16385)]
    assert len(set(lengths)) == 8 + 5 * 8
    for length, filled in enumerate(lengths, start=1):
        assert filled >= length
        assert filled - length < max(64, length / 8)
        assert rounded_up(filled) == filled


def test_pads_have_no_labels_and_a_document_of_their_own() -> None:
    short = rows((5, 3, 60))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    bare, filled = WithoutMask(collate)(short), WithoutMask(collate, Buckets(1e9, 9))(short)
    assert (bare["num_tokens"], filled["num_tokens"]) == (68, 68)
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(filled[name][:, :68], bare[name])
        assert filled[name].shape == (1, 128)
    assert filled["input_ids"][:, 68:].unique().tolist() == [9]
    assert filled["labels"][:, 68:].unique().tolist() == [-100]
    assert filled["position_ids"][0, 68:].tolist() == list(range(60))
    assert filled["seq_idx"][:, 68:].unique().tolist() == [3]
    assert filled["cu_seq_lens_q"].tolist() == filled["cu_seq_lens_k"].tolist() == [0, 5, 8, 68, 128]
    assert filled["cu_seq_lens_q"].dtype == torch.int32
    assert (filled["max_length_q"], filled["max_length_k"]) == (60, 60)


def test_padded_rows_are_filled_up() -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    filled = WithoutMask(collate, Buckets(1e9, 9))(rows((5, 70)))
    assert set(filled) == {"input_ids", "labels", "num_tokens", "supervised"}
    assert filled["num_tokens"] == 75
    assert filled["input_ids"].shape == filled["labels"].shape == (2, 128)


@pytest.mark.parametrize(("tokens", "length"), [(129, 128), (128, 100), (1, 100), (1e9, 128)])
def test_only_small_batches_are_filled_up(tokens, length) -> None:
    assert collated(rows((100,)), False, tokens)["input_ids"].shape == (1, length)


def test_no_length_passes_a_context_of_the_model() -> None:
    batch = {"input_ids": torch.ones(1, 90), "labels": torch.ones(1, 90)}
    for ends, length in [({100, 4096}, 100), ({64}, 128), ({90}, 90), ({128}, 128)]:
        filled = Buckets(1e9, 0, frozenset(ends)).fill(batch)
        assert filled["input_ids"].shape == (1, length)
        assert torch.equal(filled["labels"], F.pad(batch["labels"], (0, length - 90), value=-100))


def test_contexts_of_a_stretched_model() -> None:
    words = ("+model=llama", "model.tiny=true")
    model, _ = ftcore.load([*words, "model.rope_scaling={rope_type: yarn, factor: 4.0}", "model.max_length=8192"])
    assert contexts(model.config) == {2048, 8192}
    model, _ = ftcore.load(["+model=gemma3", "model.tiny=true"])
    assert contexts(model.config) == {2048}


# A run --------------------------------------------------------------------------------------------------------------


class Batches:
    """A plugin that looks at the trainer and the first batches."""

    def __init__(self, records: bool) -> None:
        self.records = records

    @ftcore.hookimpl(wrapper=True)
    def ftcore_make_trainer(self, model: Any):
        if self.records:  # as on a GPU
            for module in model.modules():
                if hasattr(module, "ftcore_recompute"):
                    module.ftcore_recompute.graphs = Nothing()
        trainer = yield
        self.collator = trainer.data_collator
        self.batches = list(itertools.islice(trainer.get_train_dataloader(), 3))
        return trainer


class Nothing:
    """Graphs that never record."""

    def ready(self, key: Any) -> None:
        return None

    def due(self, key: Any) -> bool:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("packing", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_run_fills_its_batches_up(in_tmp, packing) -> None:
    words = ["+model=qwen3", "model.tiny=true", "model.dtype=float32", "+trainer=sft", "trainer.max_length=150"]
    words += [f"trainer.packing={packing}", "trainer.max_steps=3", "trainer.global_batch=4", "trainer.micro_batch=2"]
    words += ["prompts=[]", "kernels=[reference]"]
    results, seen = [], [Batches(False), Batches(True)]
    for batches in seen:
        results.append(ftcore.run(words, plugins=[batches]))
        assert type(batches.collator) is WithoutMask
        assert all("attention_mask" not in batch for batch in batches.batches)
        assert all(("position_ids" in batch) == (packing == "true") for batch in batches.batches)
    lengths = [{batch["input_ids"].shape[1] for batch in batches.batches} for batches in seen]
    assert any(length % 64 for length in lengths[0])
    assert not any(length % 64 for length in lengths[1])
    for name in ("loss_first", "loss_last"):
        assert results[0].metrics[name] == pytest.approx(results[1].metrics[name], rel=1e-5)
    for one, other in zip(seen[0].batches, seen[1].batches, strict=True):
        assert one["num_tokens"] == other["num_tokens"]
