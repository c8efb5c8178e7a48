"""Which mask a batch needs, said in O(S), and which kernel takes it: masks, models on a CPU, kernels on a GPU."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

import ftcore
from ftcore.patching import BOUND, unpatch
from ftcore.testing import maths, runs
from ftcore_kernels.layers.decoder.attention import Capped, Documents, Flash, Mask, capped, choice, interface, kernels
from ftcore_kernels.layers.decoder.attention.mask import describe

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")]
LENGTHS = (65, 1, 129, 63, 128, 1, 64, 127)
"""Documents around the tile sizes of kernels, and of one token."""
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "mistral")
WINDOW = 8


def positions(lengths: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def documents(lengths: Sequence[int], device: str = "cpu") -> Documents:
    first = positions(lengths) == 0
    return Documents.beginning(first, torch.device(device))


# What a mask says ---------------------------------------------------------------------------------------------------


def config(name: str, window: int | None = None) -> Any:
    """Of a model that looks its mask function up under a name."""
    made = transformers.MistralConfig(sliding_window=window)
    made._attn_implementation = name
    return made


def masks(window: int | None, **given: Any) -> tuple[Any, Any]:
    """What ftcore's mask function answers, and transformers' dense mask for SDPA."""
    interface._register()
    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    shape = given.pop("shape")
    given = {"inputs_embeds": torch.zeros(*shape, 4), "attention_mask": None, "past_key_values": None, **given}
    return tuple(create(config=config(name, window), **given) for name in (choice.SDPA, "sdpa"))


def spelled_out(mask: Mask, rows: int, length: int) -> torch.Tensor:
    """The dense mask that a window and documents mean, from the offsets alone."""
    token = torch.arange(rows * length)
    own = token // length
    if mask.reading.documents is not None:
        own = torch.searchsorted(mask.reading.documents.offsets.long(), token, right=True)
    seen = (own[:, None] == own) & (token[:, None] >= token) & (token[:, None] // length == token // length)
    if mask.window is not None:
        seen &= token[:, None] - token < mask.window
    blocks = seen.view(rows, length, rows, length)
    return torch.stack([blocks[row, :, row] for row in range(rows)])[:, None]


PADS = {
    "right": [[1] * 20, [1] * 13 + [0] * 7],
    "none": [[1] * 20, [1] * 20],
    "left": [[0] * 7 + [1] * 13, [1] * 20],
    "both sides": [[0] * 3 + [1] * 13 + [0] * 4, [0] * 19 + [1]],
    "a row of pads": [[0] * 20, [0] * 2 + [1] * 18],
}


@pytest.mark.parametrize("window", [None, 1, 5, 64, 128, 577, 578])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,) * 9, (578,), (2, 576)], ids=str)
def test_packed_documents_are_described(lengths, window) -> None:
    total = sum(lengths)
    ours, dense = masks(window, shape=(1, total), position_ids=positions(lengths))
    if len(lengths) == 1 and (window or total) >= total:
        assert ours is None
        assert dense is None or torch.equal(dense[0, 0], torch.ones(total, total).tril().bool())
        return
    assert isinstance(ours, Mask)
    assert torch.equal(spelled_out(ours, 1, total), dense)
    assert torch.equal(ours.dense, dense)
    found = ours.reading.documents
    if found is not None:
        assert found.real is None
        assert found.offsets.dtype == torch.int32
        assert found.longest >= max(lengths) or window == 1
        assert all(number & (number - 1) == 0 for number in (found.longest, len(found.offsets) - 1))


def test_packed_documents_in_several_rows() -> None:
    rows = torch.cat([positions((3, 7, 2)), positions((12,)), positions((1, 1, 10))])
    ours, dense = masks(4, shape=(3, 12), position_ids=rows)
    assert torch.equal(spelled_out(ours, 3, 12), dense)


@pytest.mark.parametrize("lengths", [(20,), (12, 8), (4, 4, 4, 4, 4)], ids=str)
def test_a_window_that_no_argument_names_is_not_lost(lengths) -> None:
    """Some models give theirs as one more function of two positions."""
    document = (positions(lengths) == 0).cumsum(1)
    functions = [causal_mask_function, packed_sequence_mask_function(document), sliding_window_overlay(5)]
    sizes = {"batch_size": 1, "q_length": 20, "kv_length": 20, "device": torch.device("cpu")}
    sees = {"mask_function": and_masks(*functions), "allow_is_causal_skip": False}
    assert Mask(lambda **given: None, True, sizes | sees).reading.complete == (max(lengths) <= 5)
    named = {"mask_function": and_masks(*functions), "allow_is_causal_skip": False, "local_size": 5}
    assert Mask(lambda **given: None, True, sizes | named).reading.complete


@pytest.mark.parametrize("pads", [None, *PADS])
@pytest.mark.parametrize("chunk", [1, 2, 6, 19, 20])
def test_chunks_are_no_windows(chunk, pads) -> None:
    interface._register()
    padding = None if pads is None else torch.tensor(PADS[pads])
    given = {"inputs_embeds": torch.zeros(2, 20, 4), "attention_mask": padding, "past_key_values": None}
    made = [config(name) for name in (choice.SDPA, "sdpa")]
    for one in made:
        one.attention_chunk_size = chunk
    ours, dense = (create_chunked_causal_mask(config=one, **given) for one in made)
    if isinstance(ours, Mask):
        assert ours.reading.complete == (padding is None or chunk in (1, 20))
        real = torch.tensor(True) if padding is None else padding.bool()[:, None, :, None]
        if ours.reading.complete and dense is not None:
            assert torch.equal(spelled_out(ours, 2, 20) & real, dense & real)
        assert ours.dense is dense or torch.equal(ours.dense, dense)
    else:
        assert chunk == 20


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("pads", PADS)
def test_padding_is_described(pads, window) -> None:
    padding = torch.tensor(PADS[pads])
    ours, dense = masks(window, shape=(2, 20), attention_mask=padding)
    assert isinstance(ours, Mask)
    assert ours.reading.complete
    assert (ours.reading.documents is None) == (pads in ("right", "none"))
    if dense is None:
        assert ours.dense is None
        dense = torch.ones(20, 20).tril().bool().expand(2, 1, 20, 20)
    else:
        assert torch.equal(ours.dense, dense)
    real = padding.bool()[:, None, :, None]  # what a pad on the right sees does not matter
    assert torch.equal(spelled_out(ours, 2, 20) & real, dense & real)
    if ours.reading.documents is not None:
        assert torch.equal(
            ours.reading.documents.real, masks(None, shape=(2, 20), attention_mask=padding)[1].any(-1)[:, 0]
        )


def test_plain_causality_is_no_mask() -> None:
    assert masks(None, shape=(2, 20)) == (None, None)
    assert masks(20, shape=(2, 19)) == (None, None)


def blocks(value: int) -> torch.Tensor:
    ids = torch.full((1, 12), -1)
    ids[:, 3:7] = value
    return ids


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 6])}, id="a hole"),
        pytest.param({"attention_mask": torch.tensor([[0, 1] * 6])}, id="holes"),
        pytest.param({"or_mask_function": lambda b, h, q, k: q + k == 3}, id="somebody's own"),
        pytest.param({"and_mask_function": lambda b, h, q, k: q != 5}, id="somebody's own, besides"),
        pytest.param({"block_sequence_ids": blocks(0)}, id="images"),
        pytest.param({"allow_is_causal_skip": False, "attention_mask": torch.ones(1, 12)}, id="dense asked for"),
    ],
)
@pytest.mark.parametrize("window", [None, 4])
def test_what_cannot_be_described_is_dense(given, window) -> None:
    ours, dense = masks(window, shape=(1, 12), **given)
    if isinstance(ours, Mask):
        assert ours.reading == (False, None)
        ours = ours.dense
    assert torch.equal(ours, dense)


def test_both_ways_is_dense() -> None:
    interface._register()
    padding = torch.tensor([[1] * 5 + [0] * 4])
    given = {"inputs_embeds": torch.zeros(1, 9, 4), "attention_mask": padding}
    ours, dense = (create_bidirectional_mask(config(name), **given) for name in (choice.SDPA, "sdpa"))
    assert torch.equal(ours, dense)


@pytest.mark.parametrize("seen", [0, 6])
def test_with_a_cache(seen) -> None:
    cache = transformers.DynamicCache()
    if seen:
        cache.update(torch.zeros(2, 1, seen, 4), torch.zeros(2, 1, seen, 4), 0)
    padding = torch.ones(2, seen + 5)
    padding[0, :3] = 0
    ours, dense = masks(None, shape=(2, 5), attention_mask=padding, past_key_values=cache)
    assert isinstance(ours, Mask) == (not seen)
    assert torch.equal(ours.dense if isinstance(ours, Mask) else ours, dense)


# Which kernel takes it, in models ------------------------------------------------------------------------------------


class ByDocument:
    """In place of FlashAttention on a CPU: document by document, from the same window and offsets."""

    recordable = by_heads = True

    def __init__(self, scale: float, window: int | None, documents: Documents | None) -> None:
        self.scale, self.window = scale, window
        self.tables = () if documents is None else documents.tables

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = q.shape
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        q, k, v = (x.transpose(1, 2).reshape(-1, heads, dim) for x in (q, k, v))
        ends = self.tables[0].tolist() if self.tables else range(0, batch * length + 1, length)
        assert ends[0] == 0
        assert ends[-1] == batch * length
        parts = []
        for first, last in itertools.pairwise(ends):
            if last == first:
                continue
            scores = torch.einsum("qhd,khd->hqk", q[first:last], k[first:last]) * self.scale
            seen = torch.ones_like(scores, dtype=torch.bool).tril()
            if self.window is not None:
                seen &= seen.triu(1 - self.window)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v[first:last]))
        out = torch.cat(parts).view(batch, length, heads, dim)
        return out * self.tables[1][:, :, None, None] if len(self.tables) > 1 else out

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.attend(q, k, v), ()

    def backward(self, dout, q, k, v, out, rest) -> Any:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(self.attend(*inputs), inputs, dout)


Chosen = list[tuple[int | None, bool]]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """The window, and whether there are documents, of every call that a kernel took; dense masks are forbidden."""
    if GPU:
        pytest.skip("stands in for a GPU")
    found: Chosen = []

    def fused(like: torch.Tensor, head_dim: int, scale: float, window: int | None, documents: Any) -> ByDocument:
        found.append((window, documents is not None))
        return ByDocument(scale, window, documents)

    def dense(**_: Any) -> None:
        raise AssertionError("a dense mask was made")

    interface._register()
    monkeypatch.setattr(choice, "fused", fused)
    monkeypatch.setattr(interface, "fused", fused)
    monkeypatch.setattr(interface, "ON", frozenset({"cpu"}))
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, choice.SDPA, _only_described)
    monkeypatch.setattr(Mask, "dense", property(lambda self: dense()))
    return found


def _only_described(**arguments: Any) -> Any:
    answer = describe(sdpa_mask, True, **arguments)
    assert answer is None or isinstance(answer, Mask)
    return answer


def pair(family: str, *words: str) -> tuple[Any, Any]:
    """The same tiny model untouched and claimed, in float32, with weights that are not where they started."""
    words = (f"+model={family}", "model.tiny=true", "model.dtype=float32", *words)
    plain, ours = runs.loaded([*words, "kernels=[]"]), runs.loaded([*words, "kernels=[reference]"])
    runs.shake(plain.model)
    ours.model.load_state_dict(plain.model.state_dict())
    return plain.model, ours.model


def batch(kind: str) -> dict[str, torch.Tensor]:
    shape = (1, sum(LENGTHS)) if kind == "packed" else (3, 20)
    ids = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(5))
    if kind == "plain":
        return {"input_ids": ids, "labels": ids}
    if kind == "packed":
        where = positions(LENGTHS)
        return {"input_ids": ids, "position_ids": where, "labels": torch.where(where == 0, -100, ids)}
    mask = torch.ones_like(ids)
    mask[1, -7:] = 0
    mask[2, -19:] = 0
    mask = mask if kind == "right" else mask.flip(1)
    # With pads on the left, the last of them is asked for the first token.
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


@pytest.mark.parametrize("kind", ["plain", "packed", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_need_no_dense_mask(family, kind, chosen, request) -> None:
    plain, ours = pair(family)
    data = batch(kind)
    loss, gradients = maths.loss_and_gradients(ours, data)
    windows = {"llama": [None], "qwen3": [None], "gemma3": [WINDOW, None]}.get(family, [WINDOW])
    assert set(chosen) == {(window, kind in ("packed", "left")) for window in windows}
    wanted, others = maths.loss_and_gradients(plain, data)
    assert_close(loss, gradients, wanted, others)


@pytest.mark.parametrize("kind", ["plain", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_decoder_that_sees_both_ways_does_so_in_every_batch(family, kind) -> None:
    """As embedding models made of decoders do, by their configs: without pads there is no mask that says so."""
    plain, ours = pair(family)
    data = {name: value.to(plain.device) for name, value in batch(kind).items()}
    causal, _ = maths.loss_and_gradients(ours, data)
    for model in (plain, ours):
        model.config.is_causal = False
    loss, gradients = maths.loss_and_gradients(ours, data)
    assert_close(loss, gradients, *maths.loss_and_gradients(plain, data))
    assert abs(float(loss) - float(causal)) > 1e-4


@pytest.mark.parametrize("kind", ["plain", "packed", "right"])
def test_a_soft_cap_needs_none_either(kind, monkeypatch) -> None:
    plain, ours = pair("gemma2")
    assert plain.config._attn_implementation == "eager"
    assert ours.config._attn_implementation == choice.EAGER
    monkeypatch.setattr(Mask, "dense", property(lambda self: pytest.fail("a dense mask was made")))
    data = {name: value.to(plain.device) for name, value in batch(kind).items()}
    assert_close(*maths.loss_and_gradients(ours, data), *maths.loss_and_gradients(plain, data))


@pytest.mark.parametrize("kind", ["packed", "right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_of_its_own_needs_none_either(family, kind, chosen) -> None:
    """The kernel for the role `attention`, where the whole layer is not claimed."""
    plain, ours = pair(family, "adapter.dropout=0.1")
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    loss, gradients = maths.loss_and_gradients(ours, batch(kind))
    assert set(chosen) == {(None, kind != "right")}
    assert_close(loss, gradients, *maths.loss_and_gradients(plain, batch(kind)))


def test_a_layer_that_goes_its_own_way_needs_none_either(chosen) -> None:
    plain, ours = pair("gemma3")
    for model in (plain, ours):
        for module in model.modules():
            if "lora_dropout" in module._modules:
                module.lora_dropout["default"] = torch.nn.Dropout(0.0)
                module.lora_dropout["default"].p = 1e-9  # read as dropout, and drops nothing
    data = batch("packed")
    loss, gradients = maths.loss_and_gradients(ours, data)
    assert set(chosen) == {(WINDOW, True), (None, True)}
    assert_close(loss, gradients, *maths.loss_and_gradients(plain, data))


def assert_close(loss: torch.Tensor, gradients: Any, wanted: torch.Tensor, others: Any) -> None:
    assert maths.apart(loss, wanted) <= 1e-5
    assert set(gradients) == set(others)
    assert all(gradient.any() for gradient in gradients.values())
    far = {name: away for name in others if not (away := maths.apart(gradients[name], others[name])) <= 1e-5}
    assert not far


@pytest.mark.skipif(GPU, reason="on a CPU masks are made dense")
@pytest.mark.parametrize("kind", ["packed", "right", "left"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "qwen2"])
def test_where_no_kernel_takes_the_description(family, kind, monkeypatch) -> None:
    plain, ours = pair(family)
    made = []
    own = sdpa_mask
    interface._register()
    counting = lambda **given: made.append(given.get("local_size")) or own(**given)  # noqa: E731
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, choice.SDPA, lambda **given: describe(counting, True, **given)
    )
    assert_close(*maths.loss_and_gradients(ours, batch(kind)), *maths.loss_and_gradients(plain, batch(kind)))
    assert len(made) == len(set(made)), "each kind of mask is made once, for all layers"


# Whom it concerns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "packed", "right", "left"])
@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2", "gemma2", "gemma3"])
def test_attention_of_its_own_in_every_family(family, kind) -> None:
    """Windows and soft caps, where the whole layer is not claimed."""
    words = ["adapter.dropout=0.1", "adapter.targets=[q_proj,v_proj,o_proj]"]
    plain, ours = pair(family, *words)
    layers = [m for m in ours.modules() if type(m).__name__.endswith("Attention")]
    assert layers and all(BOUND in vars(module) for module in layers)
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert_close(*maths.loss_and_gradients(ours, batch(kind)), *maths.loss_and_gradients(plain, batch(kind)))


def test_only_the_claimed_model_knows_the_name() -> None:
    plain, ours = pair("gemma3")
    assert plain.config._attn_implementation == "sdpa"
    assert ours.config._attn_implementation == choice.SDPA
    assert choice.SDPA not in str(ours.config.to_dict())
    copied = copy.deepcopy(ours)
    assert unpatch(ours) > 0
    assert ours.config._attn_implementation == "sdpa"
    assert copied.config._attn_implementation == choice.SDPA
    unpatch(copied)
    assert copied.config._attn_implementation == "sdpa"
    with torch.no_grad():
        data = {name: value.to(plain.device) for name, value in batch("packed").items()}
        outputs = [model.eval()(**data).logits for model in (plain, ours)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
def test_the_attention_that_somebody_chose_stays(name) -> None:
    made = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2)
    module = transformers.models.llama.modeling_llama.LlamaAttention(made, 0)
    made._attn_implementation = name
    interface.use(module)
    assert made._attn_implementation == name


def test_attention_weights_with_a_soft_cap() -> None:
    plain, ours = pair("gemma2")
    data = batch("left")
    with torch.no_grad():
        found = [
            model.eval()(**{n: x.to(model.device) for n, x in data.items()}, output_attentions=True).attentions
            for model in (ours, plain)
        ]
    assert len(found[0]) == 2
    for one, other in zip(*found, strict=True):
        real = data["attention_mask"].bool()[:, None, :, None].expand_as(one)
        torch.testing.assert_close(one.cpu()[real], other.cpu()[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_generation_of_a_padded_batch(family) -> None:
    plain, ours = pair(family)
    data = batch("left")
    del data["labels"]
    data = {name: value.to(plain.device) for name, value in data.items()}
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    outputs = [model.eval().generate(**data, **options) for model in (plain, ours)]
    assert outputs[0].shape == (3, 32)
    assert torch.equal(*outputs)


# A soft cap ----------------------------------------------------------------------------------------------------------


def by_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float, window: int | None, own: torch.Tensor
) -> torch.Tensor:
    """`[B, S, Hq, D]`, with every score in memory; `own` `[B, S]` numbers the documents."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    token = torch.arange(q.shape[2])
    seen = (token[:, None] >= token) & (own[:, :, None] == own[:, None])
    if window is not None:
        seen = seen & (token[:, None] - token < window)
    scores = (q @ k.mT * scale / cap).tanh() * cap
    return (scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("block", [1, 5000, 2**30])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("lengths", [(70,), (64, 1, 5), (1, 1, 68)], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
def test_capped_scores(heads, lengths, window, block, device, monkeypatch) -> None:
    monkeypatch.setattr(capped, "SCORES", block)
    first = (positions(lengths) == 0).repeat(2, 1)
    if len(lengths) > 1:
        first[1, 9] = True  # another document in the second row
    generator = torch.Generator().manual_seed(8)
    whole = 2 * torch.randn((2, 70, heads[0] + 2 * heads[1], 8), generator=generator).to(device)
    q, k, v = whole.transpose(1, 2).split((heads[0], heads[1], heads[1]), dim=1)
    dout = torch.randn((2, 70, heads[0], 8), generator=generator).to(device)
    before = whole.clone()
    kernel = Capped(0.3, 2.0, window, Documents.beginning(first, device) if len(lengths) > 1 else None)
    out, rest = kernel.forward(q, k, v)
    found = out, *kernel.backward(dout, q, k, v, out, rest)
    assert torch.equal(before, whole)
    inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    truth = by_formula(*inputs, 0.3, 2.0, window, first.cumsum(1) * (len(lengths) > 1))
    wanted = truth.detach(), *torch.autograd.grad(truth, inputs, dout.cpu().double())
    for one, exact_one in zip(found, wanted, strict=True):
        assert one.shape == exact_one.shape
        assert maths.apart(one.cpu(), exact_one) <= 1e-5 or exact_one.norm() < 1e-12 > one.cpu().abs().max()


def test_eager_attention_without_a_mask_hides_nothing() -> None:
    made = transformers.Gemma2Config(hidden_size=8, num_attention_heads=2, head_dim=8, attn_implementation=choice.EAGER)
    interface._register()
    module = transformers.models.gemma2.modeling_gemma2.Gemma2Attention(made, 0)
    hidden = torch.zeros(1, 9, 8)
    assert not isinstance(choice.choose(module, hidden, None, None, 50.0, {}), Capped)
    mask = Mask(sdpa_mask, False, {"local_size": None, "kv_length": 9, "allow_is_causal_skip": True})
    assert isinstance(choice.choose(module, hidden, mask, None, 50.0, {}), Capped)


# The kernels, on a GPU -----------------------------------------------------------------------------------------------


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, ends: Sequence[int]
) -> torch.Tensor:
    """`[B, S, Hq, D]` in float64, document by document."""
    offsets = torch.tensor(ends)
    return ByDocument(scale, window, Documents(offsets, 0)).attend(q, k, v)


def tensors(rows: int, length: int, heads: int, kv: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as views of one product, as a layer has them, and an incoming gradient."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn((rows, length, heads + 2 * kv, dim), generator=generator).to("cuda", dtype)
    dout = torch.randn((rows, length, heads, dim), generator=generator).to("cuda", dtype)
    return [*whole.transpose(1, 2).split((heads, kv, kv), dim=1), dout]


CASES: dict[str, tuple[tuple[int, ...], int, int | None]] = {
    "documents": (LENGTHS, 1, None),
    "documents and a window": (LENGTHS, 1, 64),
    "a narrow window": (LENGTHS, 1, 3),
    "single tokens": ((1,) * 70, 1, None),
    "rows": ((289,), 2, None),
    "rows and a window": ((289,), 2, 100),
    "documents in rows": ((129, 1, 159), 2, 65),
}


def ends_of(lengths: Sequence[int], rows: int) -> list[int]:
    return [0, *torch.tensor(list(lengths) * rows).cumsum(0).tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 1, 256)], ids=str)
@pytest.mark.parametrize("case", CASES)
class TestOnGpu:
    pytestmark = needs_gpu

    def test_against_softmax_in_float64(self, case, heads, dtype) -> None:
        lengths, rows, window = CASES[case]
        q, k, v, dout = tensors(rows, sum(lengths), *heads, dtype)
        scale = heads[2] ** -0.5
        packed = len(lengths) > 1
        first = (positions(lengths) == 0).expand(rows, -1)
        kernel = choice.fused(q, heads[2], scale, window, Documents.beginning(first, q.device) if packed else None)
        assert isinstance(kernel, Flash | kernels.Cudnn)
        assert isinstance(kernel, Flash) or not packed
        out, rest = kernel.forward(q, k, v)
        grads = kernel.backward(dout, q, k, v, out, rest)
        inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
        truth = exact(*inputs, scale, window, ends_of(lengths, rows))
        wanted = torch.autograd.grad(truth, inputs, dout.cpu().double())
        ceiling = 1e-2 if dtype is torch.bfloat16 else 2e-3
        assert out.is_contiguous()
        assert maths.apart(out.cpu(), truth.detach()) <= ceiling
        for found, one in zip(grads, wanted, strict=True):
            assert found.shape == one.shape
            assert found.isfinite().all()
            assert maths.apart(found.cpu(), one) <= 2 * ceiling

    def test_a_document_does_not_touch_another(self, case, heads, dtype) -> None:
        lengths, rows, window = CASES[case]
        if len(lengths) == 1:
            pytest.skip("one document a row")
        q, k, v, _ = tensors(rows, sum(lengths), *heads, dtype)
        first = (positions(lengths) == 0).expand(rows, -1)
        kernel = Flash(heads[2] ** -0.5, window, Documents.beginning(first, q.device))
        start, end = ends_of(lengths, 1)[1:3]
        outputs = []
        for value in (0.0, 3.0):
            moved = [x.clone() for x in (q, k, v)]
            for x in moved:
                x[0, :, start:end] += value
            out, _ = kernel.forward(*moved)
            outputs.append(out)
        same = torch.ones(rows, sum(lengths), dtype=torch.bool)
        same[0, start:end] = False
        assert torch.equal(outputs[0][same], outputs[1][same])
        assert not torch.equal(*outputs)


def on_gpu(family: str, *more: str) -> Any:
    model, _ = ftcore.load([f"+model={family}", "model.tiny=true", "model.dtype=bfloat16", *more])
    runs.shake(model, trainable_only=True)
    return model.train()


def sent(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to("cuda") for name, value in data.items()}


@pytest.fixture
def no_dense() -> Iterator[Callable[[Any], None]]:
    with pytest.MonkeyPatch.context() as patch:
        interface._register()
        patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, choice.SDPA, _only_described)
        patch.setattr(Mask, "dense", property(lambda self: pytest.fail("a dense mask was made")))
        yield


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.usefixtures("no_dense")
class TestModelsOnGpu:
    @pytest.mark.parametrize("kind", ["plain", "packed", "right", "left"])
    @pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "gemma2"])
    def test_gradients_are_those_of_plain_transformers(self, family, kind) -> None:
        """No further from float32 than transformers' own bfloat16, nearly, both under autocast as in training.

        Without it PEFT would compute LoRA's part in float32.
        """
        if (family, kind) == ("gemma2", "left"):
            pytest.skip("what eager attention makes of a query that sees nothing takes its mask")
        data = sent(batch(kind))
        plain, ours = on_gpu(family, "kernels=[]", "graphs=off"), on_gpu(family, "graphs=off")
        exact = copy.deepcopy(plain).float()
        loss, truth = maths.loss_and_gradients(exact, data)
        with torch.autocast("cuda", torch.bfloat16):
            (_, theirs), (our_loss, found) = (maths.loss_and_gradients(model, data) for model in (plain, ours))
        assert maths.apart(our_loss, loss) <= 1e-2
        assert set(found) == set(truth)

        def away(gradients: dict[str, torch.Tensor]) -> float:
            return float(torch.stack([(gradients[n].double() - truth[n].double()).norm() for n in truth]).norm())

        assert away(found) <= 1.25 * away(theirs)

    @pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
    def test_packed_batches_are_recorded(self, family) -> None:
        launched, replayed = on_gpu(family, "graphs=off"), on_gpu(family, "graphs=auto")
        for seed in range(7):
            generator = torch.Generator().manual_seed(seed)
            cut = 20 + 10 * seed  # other documents in every batch of the same shape
            ids = torch.randint(0, 250, (1, 200), generator=generator)
            data = sent({"input_ids": ids, "labels": ids, "position_ids": positions((cut, 100 - cut, 1, 99))})
            one, other = (maths.loss_and_gradients(model, data) for model in (launched, replayed))
            assert torch.equal(one[0], other[0])
            assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
        layers = [module.ftcore_recompute for module in replayed.modules() if hasattr(module, "ftcore_recompute")]
        assert [len(layer.graphs._records) for layer in layers] == [1] * len(layers)
