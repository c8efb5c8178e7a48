"""Attention by groups of heads: the numbers of the whole, but for a rounding for each group, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import DEVICE, LEVELS, adapt, base, batch, build, keep, layers, manual, own_forwards, pair, patched
from tensor_peaks import Live
from torch.autograd.function import once_differentiable

from ftcore.testing import maths, runs
from ftcore_kernels.layers.decoder import heads, steps, structure, tiles
from ftcore_kernels.layers.decoder.alone import alone
from ftcore_kernels.layers.decoder.attention import Documents, choice, kernels
from ftcore_kernels.layers.decoder.recompute import Recompute
from ftcore_kernels.reference.lora_rope import Heads

TILE = 7
"""Of 33 rows: the last tile has 5."""


@pytest.fixture
def grouped(monkeypatch) -> Any:
    """A switch: so many key-value heads in a group, or all; and tiles of so many rows."""

    def switch(group: int, tile: int = TILE) -> None:
        monkeypatch.setattr(Recompute, "group", lambda self, hidden: group)
        monkeypatch.setattr(Recompute, "tile", lambda self, hidden: tile if group else 0)

    return switch


@pytest.fixture
def any_order() -> Iterator[None]:
    """Sums in any order, as in training: cuDNN's attention has none, and FlashAttention's takes memory for one."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def kernel_calls(monkeypatch) -> Any:
    """From a model and the name of a step to a list that grows with each call of it."""

    def counting(model: Any, name: str) -> list[None]:
        calls: list[None] = []
        step = getattr(layers(model)[0].forward.keywords["structure"].ops, name)

        def counted(*args: Any, **more: Any) -> Any:
            calls.append(None)
            return step(*args, **more)

        for layer in layers(model):
            object.__setattr__(layer.forward.keywords["structure"].ops, name, counted)
        return calls

    return counting


def assert_close(one: Any, other: Any, far: float = 1e-5) -> None:
    """Loss and gradients of groups and of the whole; every parameter has a gradient on both sides."""
    assert maths.apart(one[0], other[0]) <= 1e-6
    assert set(one[1]) == set(other[1])
    assert {name: away for name in one[1] if not (away := maths.apart(one[1][name], other[1][name])) <= far} == {}
    assert [name for name in one[1] if one[1][name].dtype != other[1][name].dtype] == []
    assert [name for name, gradient in one[1].items() if not gradient.any()] == []


LORA = {
    "LoRA": None,
    "wide LoRA": {"r": 100},
    "queries": {"target_modules": ["q_proj"]},
    "output": {"target_modules": ["o_proj", "down_proj"]},
    "full": False,
}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "gemma2", "gemma3", "phi3", "mistral"])
def test_groups_are_the_whole(family, lora, grouped) -> None:
    if family == "phi3" and lora not in (None, False, LORA["wide LoRA"]):
        pytest.skip("has other names")
    _, ours = pair(family, lora=lora)
    grouped(0)
    whole = manual(ours, batch())
    grouped(1)
    for level in range(LEVELS):
        keep(ours, level)
        assert_close(manual(ours, batch()), whole)


@pytest.mark.parametrize(
    ("family", "level"),
    [
        ("qwen3", 0),
        pytest.param("qwen3", LEVELS - 2, marks=pytest.mark.slow),
        pytest.param("gemma2", 0, marks=pytest.mark.slow),
    ],
)
def test_groups_are_the_whole_on_triton(family, level, grouped) -> None:
    maths.needs_triton("triton")
    _, ours = pair(family, "triton", num_hidden_layers=1, layer_types=None)
    keep(ours, level)
    found = []
    for group in (0, 1):
        grouped(group, 4)
        found.append(manual(ours, batch(2, 5)))
    assert_close(*found)


@pytest.mark.parametrize(("number", "group"), [(4, 3), (4, 4), (3, 2), (1, 1)])
def test_groups_of_any_size(number, group, grouped) -> None:
    """The last one may have fewer heads."""
    _, ours = pair(num_attention_heads=12, num_key_value_heads=number)
    keep(ours, 0)
    grouped(0)
    whole = manual(ours, batch())
    grouped(group, 0)
    assert_close(manual(ours, batch()), whole)


PACKED = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None].expand(3, -1)


@pytest.mark.parametrize("what", ["packed", "pads"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_documents_and_pads(family, what, grouped) -> None:
    _, ours = pair(family)
    keep(ours, 0)
    data = batch()
    if what == "packed":
        data["position_ids"] = PACKED.to(data["input_ids"].device)
    else:
        data["attention_mask"] = torch.ones_like(data["input_ids"])
        data["attention_mask"][1, :3] = 0
        data["labels"][1, :4] = -100
    found = []
    for group in (0, 1):
        grouped(group)
        found.append(manual(ours, data))
    assert_close(*found)


@pytest.mark.parametrize("lora", [None, False], ids=["LoRA", "full"])
def test_16_bits_in_groups_are_no_further_from_the_truth(lora, grouped) -> None:
    """bfloat16 against float64, over all gradients: eight groups, whose parts are rounded as they are added."""
    plain = build(num_attention_heads=16, num_key_value_heads=8).to(torch.bfloat16)
    if lora is not False:
        plain = adapt(plain)
    _, truth = maths.loss_and_gradients(copy.deepcopy(plain).double(), batch())
    ours = patched(plain)
    keep(ours, 0)

    def gradients(group: int) -> torch.Tensor:
        grouped(group)
        found = manual(ours, batch())[1]
        return torch.cat([found[name].double().flatten() for name in truth])

    exact = torch.cat([truth[name].flatten() for name in truth])
    whole, parts = gradients(0), gradients(1)
    assert maths.apart(parts, exact) <= 1.1 * maths.apart(whole, exact)
    assert maths.apart(parts, whole) <= 1e-2


@pytest.mark.parametrize("quantizer", ["fp8", "bnb_nf4"])
def test_quantized_weights_in_groups(quantizer, grouped, kernel_calls) -> None:
    """Dequantized for all groups of a pass at once, not for each; float8 rounds each group's gradients by itself."""
    if quantizer == "bnb_nf4":
        pytest.importorskip("bitsandbytes")
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", f"+quantizer={quantizer}", "kernels=[reference]"]
    ours = runs.loaded(words).model
    runs.shake(ours, trainable_only=True)
    data = runs.batch_for(ours)
    assert layers(ours)[0].self_attn.config.num_key_value_heads > 1
    for level in (0, LEVELS - 1):
        keep(ours, level)
        found, calls = [], []
        for group in (0, 1):
            grouped(group)
            counted = kernel_calls(ours, "nf4_dequantize")
            found.append(manual(ours, data))
            calls.append(len(counted))
        assert_close(*found, far=1e-5 if quantizer == "bnb_nf4" else 5e-2)
        assert quantizer == "fp8" or calls[1] <= 1.5 * calls[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_groups_of_layers_whose_inputs_are_made_again(family, grouped) -> None:
    """To the last bit: it is the same groups both times."""
    _, ours = pair(family, num_hidden_layers=4, layer_types=None)
    keep(ours, 0)
    grouped(1)
    found = []
    for inside in (False, True):
        for layer in layers(ours)[1:]:
            layer.ftcore_recompute.inside = inside
        found.append(manual(ours, batch()))
    assert torch.equal(found[0][0], found[1][0])
    assert [name for name, gradient in found[0][1].items() if not torch.equal(found[1][1][name], gradient)] == []


def test_evaluation_in_groups(grouped) -> None:
    _, ours = pair("gemma2")
    found = []
    with torch.no_grad(), own_forwards(ours) as calls:
        for group in (0, 1):
            grouped(group)
            found.append(ours(**batch()).logits)
    assert not calls
    assert maths.apart(*found) <= 1e-6


def test_groups_are_what_computes(grouped, monkeypatch) -> None:
    """And attention is given no more heads than theirs."""
    _, ours = pair(num_attention_heads=8, num_key_value_heads=4)
    keep(ours, 0)
    seen = set()
    causal = choice._causal

    def counted(q: Any, k: Any, v: Any, scale: float) -> Any:
        seen.add((q.shape[1], k.shape[1]))
        return causal(q, k, v, scale)

    monkeypatch.setattr(choice, "_causal", counted)
    for group, numbers in ((0, (8, 4)), (2, (4, 2)), (1, (2, 1))):
        seen.clear()
        grouped(group)
        manual(ours, batch())
        assert seen == {numbers}


# How many heads ----------------------------------------------------------------------------------------------------


def shaped(tokens: int, q: int = 32, kv: int = 8, dim: int = 128, by_heads: bool = True, documents: int = 1) -> Any:
    """A layer of one row, as far as the size of a group goes."""
    tables = () if documents == 1 else (torch.zeros(documents + 1, dtype=torch.int32),)
    attention = SimpleNamespace(by_heads=by_heads, tables=tables)
    return SimpleNamespace(batch=1, length=tokens, heads=Heads(q, kv, dim), attention=attention)


@pytest.mark.parametrize(
    ("layer", "wanted", "found"),
    [
        (shaped(8192), 0, 0),
        (shaped(8192), 2, 2),
        (shaped(8192), 8, 0),
        (shaped(349_525), 0, 0),  # x 6144 columns = 2^31 - 2048
        (shaped(349_526), 0, 7),
        (shaped(1_000_000), 0, 2),
        (shaped(1_000_000), 1, 1),
        (shaped(1_000_000), 8, 2),
        (shaped(2_796_202), 0, 1),
        (shaped(1_000_000, kv=32), 0, 5),  # 3 x 128 columns a head
        (shaped(524_288, q=8, kv=8, dim=256), 0, 5),
        (shaped(500_000, q=16, kv=16, dim=96, documents=8192), 0, 10),  # 2^20 rows more, and 128 channels
        (shaped(1_000_000, by_heads=False), 0, 0),
        (shaped(8192, by_heads=False), 1, 0),
    ],
)
def test_groups_stay_below_32_bits(layer, wanted, found) -> None:
    assert heads.size(layer, wanted) == found
    if layer.attention.by_heads:
        each = layer.heads.q // layer.heads.kv
        for group in [found or layer.heads.kv]:
            assert layer.length * group * (each + 2) * layer.heads.dim < 2**31


def test_what_kernels_cannot_count_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2796203 tokens is too long .* fewer rows or a shorter length"):
        heads.size(shaped(2_796_203), 0)


def test_batches_are_counted_whole(grouped) -> None:
    """Two rows of half the length are as many elements, and documents add rows of their own."""
    layer = shaped(174_763)
    layer.batch = 2
    assert heads.size(layer, 0) == 7


def llama_8b() -> Recompute:
    """Of an 8B layer without LoRA."""

    def linear(inputs: int, outputs: int) -> Any:
        return SimpleNamespace(in_features=inputs, out_features=outputs, weight=torch.empty(0), r={})

    qkv = [linear(4096, 4096), linear(4096, 1024), linear(4096, 1024)]
    return Recompute([qkv, [linear(4096, 4096)], [linear(4096, 14336)] * 2, [linear(14336, 4096)]], 128, False)


@pytest.mark.parametrize(
    ("tokens", "group"), [(2048, 0), (8192, 0), (16_384, 0), (65_536, 2), (131_072, 1), (700_000, 1), (2**20, 1)]
)
def test_long_rows_of_a_real_layer_are_grouped(tokens, group) -> None:
    recompute = llama_8b()
    hidden = torch.empty((1, tokens, 4096), device="meta")
    assert recompute.group(hidden) == 0, "memory is not short"
    recompute.tiled = True
    assert recompute.group(hidden) == group
    with torch.no_grad():
        assert recompute.group(hidden) == 0, "nothing is kept"
    less = recompute.workspace(1, tokens, True)
    tile = recompute._tile(tokens)
    whole = recompute._in_tiles(tokens, tile) if tile else recompute._whole(tokens)
    assert (whole - less >= 2**30) if group else whole == less


def test_what_a_token_takes_in_a_million() -> None:
    """In KiB, with the layer's input, which `workspace` does not count: 32 for what is as wide, 8.5 a group.

    Of those, 2 are expanded gradients of keys and values, and 1.5 a copy that only the norm of heads needs.
    """
    recompute = llama_8b()
    token = (recompute.workspace(1, 2**20, True) - recompute.workspace(1, 2**19, True)) / 2**19
    assert (token + 8192) / 1024 == 40.5


# The incoming gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 1])
def test_gradients_that_others_hold_stay(group, grouped) -> None:
    """A hook's, one that two functions are given, and the hidden states' own; and one that nobody holds is reused."""
    _, ours = pair(num_hidden_layers=3)
    data = batch()
    keep(ours, 0)
    found: list[dict[str, torch.Tensor]] = []
    for switch in (0, group):
        grouped(switch)
        held: dict[str, torch.Tensor] = {}
        grouped_out = base(ours).model(data["input_ids"], output_hidden_states=True).hidden_states
        grouped_out[1].register_hook(lambda grad, held=held: held.update(hook=grad))
        grouped_out[2].retain_grad()
        total = sum((number + 1) * state.square().sum() for number, state in enumerate(grouped_out))
        copies: dict[str, torch.Tensor] = {}
        grouped_out[1].register_hook(lambda grad, copies=copies: copies.update(hook=grad.clone()))
        top = torch.ones_like(total)
        total.backward(top)
        assert torch.equal(held["hook"], copies["hook"]), "a layer wrote over a gradient that a hook held"
        held["kept"] = grouped_out[2].grad
        found.append({name: grad.clone() for name, grad in held.items()})
        ours.zero_grad()
    for name in ("hook", "kept"):
        assert maths.apart(found[0][name], found[1][name]) <= 1e-5


@pytest.mark.skipif(not hasattr(torch.Tensor, "_use_count"), reason="this PyTorch does not say who holds a tensor")
@pytest.mark.parametrize("group", [0, 1])
def test_every_layer_writes_over_the_gradient_of_the_one_above(group, grouped, monkeypatch) -> None:
    """As the count of their memory has it."""
    _, ours = pair(num_hidden_layers=4)
    keep(ours, 0)
    grouped(group)
    own, into = steps.backward, []

    def spied(*args: Any, **kwargs: Any) -> Any:
        into.append(kwargs["into"] is not None)
        return own(*args, **kwargs)

    monkeypatch.setattr(steps, "backward", spied)
    manual(ours, batch())
    assert into == [True] * 4


@pytest.mark.skipif(not hasattr(torch.Tensor, "_use_count"), reason="this PyTorch does not say who holds a tensor")
def test_only_a_gradient_that_nobody_else_holds_is_alone() -> None:
    answers: dict[str, bool] = {}

    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.name = name
            return x + 1

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dout: torch.Tensor) -> Any:
            answers[ctx.name] = alone(dout)
            return dout * 2, None

    x = torch.zeros(3, requires_grad=True)
    kept: list[torch.Tensor] = []
    hooked = Named.apply(x, "hook")
    hooked.register_hook(lambda grad: kept.append(grad))
    plain = Named.apply(Named.apply(hooked, "plain"), "next")
    viewed = Named.apply(x, "view")
    viewed.register_hook(lambda grad: kept.append(grad[1:]))
    both = Named.apply(x, "one of two"), Named.apply(x, "other of two")
    (plain * 2 + Named.apply(viewed, "before the view") * 3 + (both[0] + both[1]) * 4).backward(torch.ones(3))
    shared = {name for name, answer in answers.items() if not answer}
    assert shared in ({"hook", "view", "one of two"}, {"hook", "view", "other of two"}), "the last one is alone"


# Memory ------------------------------------------------------------------------------------------------------------


class FlashLike:
    """What FlashAttention makes, in size: sums of dq in 32 bits, and keys' gradients for each query head."""

    recordable, by_heads, tables = False, True, ()

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return q.new_zeros(q.transpose(1, 2).shape), (q.new_zeros(q.shape[:3]),)

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, rest: Any) -> Any:
        size = q.transpose(1, 2).shape
        sums, expanded = q.new_empty(size, dtype=torch.float64), [q.new_empty(size) for _ in range(2)]
        grads = [x.new_zeros(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v)]
        del sums, expanded
        return grads


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what is allocated, with kernels that do nothing")
@pytest.mark.parametrize(("family", "group"), [("llama", 1), ("llama", 2), ("qwen3", 1), ("gemma2", 1)])
def test_groups_take_what_they_are_said_to(family, group, grouped, monkeypatch) -> None:
    """Bytes of a token, from two lengths. Said for 16-bit activations, and these have 32 bits.

    Only families with a norm on heads have a copy of queries, keys and values that is counted for all.
    """
    maths.needs_triton("triton")  # plain PyTorch has temporaries of its own
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **constants: None)
    monkeypatch.setattr(structure, "choose", lambda *given: FlashLike())
    monkeypatch.setattr(tiles, "MULTIPLE", 64)
    monkeypatch.setattr(heads, "BYTES", 2 * 256 * 64)
    more = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 1}
    plain = build(family, **more | {"intermediate_size": 512, "layer_types": None})
    ours = patched(adapt(plain, family, r=1, target_modules=["down_proj"]), family, "triton")
    keep(ours, 0)
    layer = layers(ours)[0]

    def peak(tokens: int) -> int:
        grouped(group, 64)
        x = torch.randn(1, tokens, 256, requires_grad=True)
        tables = torch.randn(2, 1, tokens, 16)
        out = layer(x, position_embeddings=tuple(tables))
        dout = torch.ones_like(out)  # not counted, but held: the gradient of the residual stream is made beside it
        with Live() as backward:
            out.backward(dout)
        return backward.peak

    recompute: Recompute = layer.ftcore_recompute
    recompute.width = 4
    said = (recompute._in_groups(4096, 64, group) - recompute._in_groups(2048, 64, group)) / 2048
    measured = (peak(4096) - peak(2048)) / 2048
    if family != "qwen3":
        said -= 4 * group * 6 * 16
    assert measured == pytest.approx(said, rel=0.03)


# On a GPU ----------------------------------------------------------------------------------------------------------

needs_hopper = pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with cuDNN's kernels"
)


def gpu_pair(**more: Any) -> Any:
    """A claimed model in bf16, and what it was."""
    plain = adapt(build("llama", **more).to(torch.bfloat16), r=32)
    return plain, patched(plain, kernel_set="triton")


@pytest.mark.gpu
@needs_hopper
def test_cudnn_computes_groups_as_it_does_the_whole(any_order, grouped, monkeypatch, recwarn) -> None:
    """One long causal row: views of a group's columns are taken as they are."""
    _, ours = gpu_pair(hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
                       max_position_embeddings=4096)  # fmt: skip
    keep(ours, 0)
    seen = []
    forward = kernels.Cudnn.forward

    def counted(self: Any, q: Any, k: Any, v: Any) -> Any:
        out, rest = forward(self, q, k, v)
        seen.append((q.shape[1], k.shape[1], q.stride(2), out.is_contiguous()))
        return out, rest

    monkeypatch.setattr(kernels.Cudnn, "forward", counted)
    found = []
    for group in (0, 1):
        grouped(group, 512)
        found.append(manual(ours, batch(1, 2048)))
    border = layers(ours)[0].ftcore_recompute._borders[0]  # LoRA's columns beside the whole product
    assert set(seen) == {(8, 4, 16 * 64 + border, True), (2, 1, 4 * 64, True)}
    assert [str(w.message) for w in recwarn if "stride" in str(w.message)] == []
    assert maths.apart(found[0][0], found[1][0]) <= 1e-3
    far = {name: maths.apart(found[0][1][name], found[1][1][name]) for name in found[0][1]}
    assert max(far.values()) <= 2e-2, far
    together = [torch.cat([of[1][name].float().flatten() for name in far]) for of in found]
    assert maths.apart(*together) <= 1e-2


@pytest.mark.gpu
@needs_hopper
def test_memory_of_a_real_layer_in_groups(any_order, grouped) -> None:
    """Bytes of a token in the backward of an 8B layer, its input and the incoming gradient among them."""
    more = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    _, ours = gpu_pair(**more, head_dim=128, num_hidden_layers=1, max_position_embeddings=2**17)
    keep(ours, 0)
    layer = layers(ours)[0]
    grouped(1, 4096)

    def peak(tokens: int) -> int:
        x = torch.randn(1, tokens, 4096, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        tables = base(ours).model.rotary_emb(x, torch.arange(tokens, device=DEVICE)[None])
        for _ in range(2):  # the first compiles
            x.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated() - 2 * x.numel()
            out = layer(x, position_embeddings=tables) * 0.5
            grad = torch.ones((), device=DEVICE, dtype=torch.bfloat16).expand_as(out)
            torch.cuda.reset_peak_memory_stats()
            out.backward(grad)
            found = torch.cuda.max_memory_allocated() - before - 2 * out.numel()
            del out, grad
        return found

    token = (peak(65_536) - peak(32_768)) / 32_768 / 1024
    print(f"{token:.1f} KiB a token")
    in_place = hasattr(torch.Tensor, "_use_count")
    assert token <= (42 if in_place else 50)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", ["cudnn", "flash", "documents", "window"])
def test_kernels_take_a_group_of_a_million_tokens(kind) -> None:
    """One key-value head and four queries, against fp32 for the last queries, which see all keys."""
    tokens, last, dim = 2**20, 64, 128
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    kernel = {
        "cudnn": kernels.Cudnn(dim**-0.5),
        "flash": kernels.Flash(dim**-0.5),
        "documents": kernels.Flash(dim**-0.5, documents=Documents(offsets, tokens)),
        "window": kernels.Flash(dim**-0.5, window=tokens // 2),
    }[kind]
    whole = torch.randn(1, tokens, 6, dim, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    q, k, v = whole.split((4, 1, 1), dim=1)
    out, rest = kernel.forward(q, k, v)
    dout = torch.zeros_like(out)
    dout[:, -last:] = torch.randn_like(dout[:, -last:])
    dq, dk, dv = kernel.backward(dout, q, k, v, out, rest)
    exact = [x.float().detach().requires_grad_() for x in (q[:, :, -last:], k, v)]
    scores = exact[0] @ exact[1].mT * dim**-0.5
    row = torch.arange(tokens - last, tokens, device=DEVICE)[:, None]
    column = torch.arange(tokens, device=DEVICE)
    hidden = column > row
    if kind == "window":
        hidden |= column <= row - tokens // 2
    truth = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ exact[2]).transpose(1, 2)
    grads = torch.autograd.grad(truth, exact, dout[:, -last:].float())
    for mine, other in zip((out[:, -last:], dq[:, :, -last:], dk, dv), (truth.detach(), *grads), strict=True):
        assert maths.apart(mine.float(), other) <= 2e-2
