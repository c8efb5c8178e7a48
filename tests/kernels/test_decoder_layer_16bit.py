"""Whole decoder layers in 16 bits: no further from float64 than transformers' and PEFT's own.

All start from the same 16-bit weights and inputs, at head dimensions of real models; on a GPU each gets the attention
kernel that it has in training. Hidden states are differentiated, not a loss, whose gradients fp16 could not hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoders import DEVICE, FAMILIES, LEVELS, adapt, base, build, keep, own_forwards, patched

from ftcore.testing import maths

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter truncates to bf16 instead of rounding"),
]
TRITON = [
    pytest.param(("triton", True), id="triton", marks=ON_GPU),
    pytest.param(("triton", False), id="triton, fastest", marks=ON_GPU),
]
WAYS = [pytest.param(("reference", True), id="reference"), *TRITON]
NO_BF16 = DEVICE.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
DTYPES = [
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.skipif(NO_BF16, reason="before sm_80 there is no bf16")),
    pytest.param(torch.float16, id="fp16", marks=[] if torch.cuda.is_available() else pytest.mark.slow),
]
HEAD_DIMS = {
    "llama": 64,
    "llama with biases": 128,
    "mistral": 128,
    "qwen2": 64,
    "qwen2 with a window": 64,
    "qwen3": 128,
    "gemma2": 128,
    "gemma3": 256,
    "phi3": 64,
}
WINDOW = 48
LORA = {"r": 16, "lora_alpha": 16}
BATCHES = {
    "65 tokens": (3, 65, None),
    "300 tokens": (2, 300, None),
    "left": (3, 130, "left"),
    "right": (3, 130, "right"),
}
"""Rows, length, and the side of the pads."""
CEILINGS = 2.5, 5.0
"""Of hidden states and of gradients, in machine epsilons: conftest's for one operation, 0.5 and 1.3 of bfloat16's, for
the four blocks (attention and MLP, twice) that are one behind the other here."""
KEPT_APART = 1e-2

Way = tuple[str, bool]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Results = dict[str, torch.Tensor]


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """The kernel set, and whether results are deterministic: cuDNN's attention, the fastest on Hopper, never is."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param[1])
    yield request.param
    torch.use_deterministic_algorithms(before)


def model_of(family: str, dtype: torch.dtype, lora: bool = True) -> Any:
    """Untouched, every value one of `dtype`; A and B are in float32 all the same, as PEFT makes them."""
    dim = HEAD_DIMS[family]
    width = min(4 * dim, 512)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": dim, "max_position_embeddings": 512}
    if "sliding_window" in FAMILIES[family].more:
        sizes["sliding_window"] = WINDOW
    if family == "gemma2":
        sizes["query_pre_attn_scalar"] = dim
    model = build(family, **sizes).to(dtype)
    if lora:
        model = adapt(model, family, **LORA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def batch_of(name: str, model: Any, dtype: torch.dtype) -> Batch:
    """Embeddings and upstream gradients `[B, S, H]`, the mask `[B, S]`; what pads are given has no gradient."""
    rows, length, side = BATCHES[name]
    drawn = torch.Generator().manual_seed(5)
    shape = rows, length, model.config.hidden_size
    embeddings, upstream = (torch.randn(*shape, generator=drawn).to(DEVICE, dtype) for _ in range(2))
    mask = torch.ones(rows, length, dtype=torch.long)
    if side is not None:
        mask[1, -17:], mask[2, -40:] = 0, 0
        mask = mask if side == "right" else mask.flip(1)
    mask = mask.to(DEVICE)
    return embeddings, upstream * mask[..., None].to(dtype), mask


def results(model: Any, batch: Batch) -> Results:
    """Hidden states of the tokens that are not pads, gradients of the embeddings and of all trained parameters."""
    embeddings, upstream, mask = batch
    dtype = base(model).model.embed_tokens.weight.dtype
    embeddings = embeddings.to(dtype, copy=True).requires_grad_()
    model.zero_grad()
    hidden = base(model).model(inputs_embeds=embeddings, attention_mask=None if mask.all() else mask).last_hidden_state
    hidden.backward(upstream.to(dtype))
    found = {"hidden states": hidden.detach()[mask == 1], "embeddings": embeddings.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def manual(model: Any, batch: Batch) -> Results:
    """Without the family's own forward."""
    with own_forwards(model) as calls:
        found = results(model, batch)
    assert not calls, "the layer fell back on the family's own forward"
    return found


def assert_no_worse(found: Results, theirs: Results, truth: Results, eps: float) -> None:
    """As near to the exact values as transformers' are, nearly: every tensor, and all of them together."""
    assert set(found) == set(theirs) == set(truth)
    assert all(exact.isfinite().all() and exact.any() for exact in truth.values())
    mine, other = ({name: maths.apart(x[name], exact) for name, exact in truth.items()} for x in (found, theirs))
    far = {}
    for name, exact in truth.items():
        assert (found[name].dtype, found[name].shape) == (theirs[name].dtype, theirs[name].shape)
        # As conftest: a norm over few roundings scatters. A tensor's last rounding alone is eps / 5.
        slack = 1.25 if exact.numel() < 1000 else 1.0
        limit = slack * min(1.1 * other[name] + eps / 20, CEILINGS[name != "hidden states"] * eps)
        if not mine[name] <= limit:
            far[name] = f"{mine[name]:.2e}, transformers {other[name]:.2e}"
    assert not far
    ours, whole = (sum(error**2 for error in errors.values()) ** 0.5 for errors in (mine, other))
    assert ours <= 1.1 * whole  # the same rule as for each


def check(family: str, dtype: torch.dtype, name: str, kernel_set: str, lora: bool = True) -> None:
    plain = model_of(family, dtype, lora)
    batch = batch_of(name, plain, dtype)
    found = manual(patched(plain, family, kernel_set), batch)
    truth = results(copy.deepcopy(plain).double(), batch)
    assert_no_worse(found, results(plain, batch), truth, torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("name", ["65 tokens", "left"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", HEAD_DIMS)
def test_lora(family, dtype, name, way) -> None:
    if (family, name) == ("gemma2", "left"):
        pytest.skip("its eager softmax is in float32, where what float64 masks pads with is infinite: no truth")
    check(family, dtype, name, way[0])


@pytest.mark.parametrize("way", TRITON, indirect=True)
@pytest.mark.parametrize("name", ["300 tokens", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", HEAD_DIMS)
def test_lora_on_longer_rows(family, dtype, name, way) -> None:
    check(family, dtype, name, way[0])


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", HEAD_DIMS)
def test_full_fine_tuning(family, dtype, way) -> None:
    check(family, dtype, "65 tokens", way[0], lora=False)


@pytest.mark.parametrize("way", TRITON, indirect=True)
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("name", ["300 tokens", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", HEAD_DIMS)
def test_gradients_do_not_depend_on_what_is_kept(family, dtype, name, lora, way) -> None:
    """To the last bit, unless attention adds up in an order of its own."""
    kernel_set, deterministic = way
    plain = model_of(family, dtype, lora)
    batch = batch_of(name, plain, dtype)
    model = patched(plain, family, kernel_set)
    everything = manual(model, batch)
    for level in range(LEVELS):
        keep(model, level)
        found = manual(model, batch)
        assert set(found) == set(everything)
        assert all(value.isfinite().all() for value in found.values())
        if deterministic:
            assert [name for name in found if not torch.equal(found[name], everything[name])] == []
        assert max(maths.apart(found[name], everything[name]) for name in found) <= KEPT_APART
