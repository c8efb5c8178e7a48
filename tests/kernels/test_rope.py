"""Rotary embedding: values, gradients, views and geometry, against fp64 and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import rope as module
from ftcore_kernels.ops.rope import rope
from ftcore_kernels.reference.rope import rope as reference


def rotation(positions, channels, interleaved=False):
    """True rotations [1, S, channels] in fp32, as a model makes them."""
    angles = positions[None, :, None].double() * 10000.0 ** (-torch.arange(0, channels, 2).double() / channels)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def formula(interleaved):
    """Each pair as a 2 x 2 matrix product, written out from the definition."""

    def apply(q, k, cos, sin):
        channels = torch.arange(cos.shape[-1]).view(*((-1, 2) if interleaved else (2, -1)))
        a, b = channels.unbind(1 if interleaved else 0)

        def turn(x):
            out = list(x.unbind(-1))
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                out[i] = x[..., i] * cos[:, None, :, i] - x[..., j] * sin[:, None, :, i]
                out[j] = x[..., j] * cos[:, None, :, j] + x[..., i] * sin[:, None, :, j]
            return torch.stack(out, -1)

        return turn(q), turn(k)

    return apply


def make(batch, q_heads, k_heads, length, head_dim, dtype, device):
    """q and k as attention makes them: transposed views of [B, S, H, D]."""
    return tuple(
        torch.randn(batch, length, heads, head_dim).to(device, dtype).transpose(1, 2).requires_grad_()
        for heads in (q_heads, k_heads)
    )


def tables(batch, length, channels, dtype, device):
    """General tables: no rotation, and the members of a pair differ."""
    return tuple(torch.randn(batch, length, channels).to(device, dtype) for _ in range(2))


def check(compare, q, k, cos, sin, interleaved=False):
    compare(
        lambda *tensors: rope(*tensors, interleaved=interleaved),
        lambda *tensors: reference(*tensors, interleaved=interleaved),
        formula(interleaved),
        (q, k, cos, sin),
    )


SHAPES = {  # batch, q heads, k heads, length, head dim, rotated channels, batch of the tables
    "one": (1, 1, 1, 1, 2, 2, 1),
    "gqa": (2, 4, 1, 7, 16, 16, 1),
    "odd": (3, 5, 3, 3, 22, 22, 3),
    "partial": (2, 3, 2, 5, 40, 12, 2),
    "odd rest": (1, 3, 2, 2, 13, 6, 1),
    "no tokens": (2, 3, 2, 0, 8, 8, 1),
    "no sequences": (0, 3, 2, 4, 8, 8, 1),
    "no heads": (1, 2, 0, 4, 8, 8, 1),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fp32_tables", [False, True], ids=["tables", "fp32 tables"])
def test_values_and_gradients(compare, device, dtype, shape, interleaved, fp32_tables):
    *sizes, channels, table_batch = shape
    table_dtype = torch.float32 if fp32_tables else dtype
    q, k = make(*sizes, dtype, device)
    check(compare, q, k, *tables(table_batch, sizes[3], channels, table_dtype, device), interleaved)


VIEWS = {
    "contiguous [B, H, S, D]": lambda: torch.randn(2, 4, 6, 8),
    "fused qkv": lambda: torch.randn(2, 6, 3, 4, 8)[:, :, 1].transpose(1, 2),
    "channels sliced": lambda: torch.randn(2, 4, 6, 20)[..., 3:11],
    "last dim strided": lambda: torch.randn(2, 4, 8, 6).transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(compare, device, dtype, view):
    def place(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x).requires_grad_()

    q, k = place(VIEWS[view]()), place(VIEWS[view]())
    cos, sin = (torch.randn(1, 12, 8).to(device, dtype)[:, ::2] for _ in range(2))
    check(compare, q, k, cos, sin)
    check(compare, q, k, cos.expand(2, -1, -1), sin.expand(2, -1, -1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    length=st.integers(0, 4),
    pairs=st.integers(1, 9),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
)
def test_any_small_shape(compare, device, batch, heads, length, pairs, rest, interleaved):
    q, k = make(batch, *heads, length, 2 * pairs + rest, torch.float32, device)
    check(compare, q, k, *tables(1, length, 2 * pairs, torch.float32, device), interleaved)


def test_more_heads_than_one_block(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 8)
    q, k = make(2, 7, 3, 2, 12, dtype, device)
    check(compare, q, k, *tables(1, 2, 8, dtype, device))


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_inverts_a_true_rotation(device, interleaved):
    q, k = make(2, 3, 2, 9, 16, torch.float32, device)
    cos, sin = (table.to(device) for table in rotation(torch.arange(9), 16, interleaved))
    turned = rope(q, k, cos, sin, interleaved)
    for back, x in zip(torch.autograd.grad(turned, (q, k), [t.detach() for t in turned]), (q, k), strict=True):
        torch.testing.assert_close(back, x.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shift", [1, 1000, 100_000])
def test_scores_depend_on_relative_positions(device, interleaved, shift):
    q, k = make(1, 2, 2, 9, 16, torch.float32, device)
    scores = []
    for start in (0, shift):
        cos, sin = (table.to(device) for table in rotation(start + torch.arange(9), 16, interleaved))
        q_turned, k_turned = rope(q, k, cos, sin, interleaved)
        scores.append((q_turned.double() @ k_turned.double().transpose(2, 3)).detach())
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, dim, stride):
    sizes, strides = [1, 1, 1, 8], [8, 8, 8, 1]
    sizes[dim], strides[dim] = 2**31 // stride + 1, stride
    q, k = huge(sizes, strides).requires_grad_(), huge(sizes, strides).requires_grad_()
    cos, sin = (huge((sizes[0], sizes[2], 8), (strides[0], strides[2], 1)) for _ in range(2))
    check(compare, q, k, cos, sin)
    upstream = huge(sizes, strides), huge(sizes, strides)
    compact = [x.clone() for x in upstream]
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(rope(q, k, cos, sin), (q, k), upstream),
            torch.autograd.grad(rope(q, k, cos, sin), (q, k), compact),
        )
    )


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_parity_with_transformers(device, dtype, family):
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    hugging_face = {"llama": modeling_llama, "cohere": modeling_cohere}[family].apply_rotary_pos_emb
    interleaved = family == "cohere"
    q, k = make(2, 4, 2, 7, 32, dtype, device)
    cos, sin = (table.to(device, dtype) for table in rotation(torch.arange(7), 32, interleaved))
    theirs = hugging_face(q, k, cos, sin)
    upstream = [torch.randn_like(x) for x in theirs]
    their_grads = torch.autograd.grad(theirs, (q, k), upstream)
    same = reference(q, k, cos, sin, interleaved)
    assert all(map(torch.equal, same, theirs))
    assert all(map(torch.equal, torch.autograd.grad(same, (q, k), upstream), their_grads))
    close = rope(q, k, cos, sin, interleaved)
    close_grads = torch.autograd.grad(close, (q, k), upstream)
    # Llama rounds three times and we round once: a few units in the last place of the largest term.
    tolerance = 8 * torch.finfo(dtype).eps
    for ours, expected in zip((*close, *close_grads), (*theirs, *their_grads), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_output_is_in_token_order(device):
    q, k = make(2, 4, 2, 7, 16, torch.float32, device)
    for out in rope(q, k, *tables(1, 7, 16, torch.float32, device)):
        assert out.transpose(1, 2).is_contiguous()


def test_refusals(device):
    q, k = make(2, 4, 2, 3, 8, torch.float32, device)
    cos, sin = tables(1, 3, 8, torch.float32, device)
    with pytest.raises(ValueError, match="number of heads only"):
        rope(q, k[:, :, :2], cos, sin)
    with pytest.raises(ValueError, match=r"\[2 or 1, 3, Dr\]"):
        rope(q, k, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match="even number"):
        rope(q, k, cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match="no gradient"):
        rope(q, k, cos.requires_grad_(), sin)
