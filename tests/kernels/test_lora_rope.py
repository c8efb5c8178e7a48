"""Low-rank update, head norm and rotation of the fused buffer: values, gradients, layouts and what is written over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import lora_rope as module
from ftcore_kernels.reference import lora_rope as reference
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads, Update

EPS = 1e-6
CONVENTIONS = {"llama": (0.0, False), "gemma": (1.0, True)}
SEPARATE, FUSED = (0, 1, 2), (0, 0, 0)


def segments(x, heads):
    """Views [M, H, D] of queries, keys and values."""
    return x.unflatten(1, (-1, heads.dim)).split((heads.q, heads.kv, heads.kv), dim=1)


def formula(qkv, cos, sin, heads, xa=None, b=None, blocks=SEPARATE, weights=None, offset=0.0):
    """Written out from the definitions, head by head and pair by pair; differentiable."""
    if b is not None:
        rank, columns, first = b.shape[1], [], 0
        for block, number in zip(blocks, (heads.q, heads.kv, heads.kv), strict=True):
            width = number * heads.dim
            columns.append(xa[:, block * rank : (block + 1) * rank] @ b[first : first + width].T)
            first += width
        qkv = qkv + torch.cat(columns, 1)
    length, half = cos.shape[1], cos.shape[2] // 2
    rows = range(qkv.shape[0])
    cos, sin = (torch.stack([t[r // length % t.shape[0], r % length] for r in rows]) for t in (cos, sin))
    done = []
    for index, head in enumerate(qkv.unflatten(1, (-1, heads.dim)).unbind(1)):
        if index >= heads.q + heads.kv:
            done.append(head)
            continue
        if weights is not None:
            scale = offset + weights[index >= heads.q]
            head = head / (head.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * scale
        channels = list(head.unbind(1))
        for i in range(half):
            one, other = channels[i], channels[i + half]
            channels[i] = one * cos[:, i] - other * sin[:, i]
            channels[i + half] = other * cos[:, i + half] + one * sin[:, i + half]
        done.append(torch.stack(channels, 1))
    return torch.cat(done, 1)


def truth(heads, blocks, convention):
    offset = CONVENTIONS[convention][0] if convention else 0.0

    def apply(qkv, cos, sin, xa, b, q_weight, k_weight, dout):
        wanted = [x.requires_grad_() for x in (qkv, q_weight, k_weight) if x is not None]
        if not qkv.numel():
            grads = [torch.zeros_like(x) for x in wanted]
            out = qkv
        else:
            weights = None if q_weight is None else (q_weight, k_weight)
            out = formula(qkv, cos, sin, heads, xa, b, blocks, weights, offset)
            grads = torch.autograd.grad(out, wanted, dout)
        return {"out": out} | dict(zip(("dqkv", "dq_weight", "dk_weight"), grads, strict=False))

    return apply


def steps(which, heads, blocks, convention, layout=lambda x: x):
    def apply(qkv, cos, sin, xa, b, q_weight, k_weight, dout):
        update = None if b is None else Update(xa, b, blocks)
        norm = HeadNorm(q_weight, k_weight, EPS, *CONVENTIONS[convention]) if convention else None
        raw = qkv.clone()
        out = which.lora_rope(qkv, cos, sin, heads, update, norm)
        batch = qkv.shape[0] // max(cos.shape[1], 1)
        grads = [layout(part.unflatten(0, (batch, cos.shape[1])).transpose(1, 2)) for part in segments(dout, heads)]
        before = [grad.clone() for grad in grads]
        dqkv, dq_weight, dk_weight = which.lora_rope_backward(
            *grads, cos, sin, heads, raw if norm else None, update if norm else None, norm, norm is not None
        )
        assert all(map(torch.equal, before, grads)), "an incoming gradient was written over"
        found = {"out": out, "dqkv": dqkv}
        return found | ({"dq_weight": dq_weight, "dk_weight": dk_weight} if norm else {})

    return apply


def make(shape, dtype, device, rank=None, blocks=SEPARATE, norm=False, table_dtype=None):
    batch, length, q, kv, dim, rotated, table_batch = shape
    tokens, width = batch * length, (q + 2 * kv) * dim

    def draw(*sizes, scale=1.0):
        return (torch.randn(*sizes) * scale).to(device, dtype)

    tables = [torch.randn(table_batch, length, rotated).to(device, table_dtype or dtype) for _ in range(2)]
    return {
        "qkv": draw(tokens, width),
        "cos": tables[0],
        "sin": tables[1],
        "xa": draw(tokens, (max(blocks) + 1) * rank) if rank else None,
        "b": draw(width, rank, scale=rank**-0.5) if rank else None,
        "q_weight": draw(dim) if norm else None,
        "k_weight": draw(dim) if norm else None,
        "dout": draw(tokens, width),
    }


def check(compare_steps, shape, dtype, device, rank=None, blocks=SEPARATE, convention=None, layout=None, **more):
    heads, layout = Heads(*shape[2:5]), layout or (lambda x: x)
    tensors = make(shape, dtype, device, rank, blocks, convention is not None, **more)
    compare_steps(
        steps(module, heads, blocks, convention, layout),
        steps(reference, heads, blocks, convention),
        truth(heads, blocks, convention),
        tensors,
    )


SHAPES = {  # batch, length, q heads, kv heads, head dim, rotated channels, batch of the tables
    "one": (1, 1, 1, 1, 16, 16, 1),
    "gqa": (2, 7, 4, 1, 16, 16, 2),
    "24": (3, 5, 3, 3, 24, 24, 1),
    "80 partial": (1, 19, 2, 1, 80, 32, 1),
    "96": (2, 3, 2, 1, 96, 96, 2),
    "96 partial": (1, 4, 2, 2, 96, 72, 1),
    "128": (1, 37, 2, 1, 128, 128, 1),
    "odd rest": (1, 5, 2, 1, 13, 6, 1),
    "no tokens": (2, 0, 2, 1, 16, 16, 1),
    "no sequences": (0, 4, 2, 1, 16, 16, 1),
}
UPDATES = {
    "no LoRA": (None, SEPARATE),
    "rank 16": (16, SEPARATE),
    "rank 32": (32, SEPARATE),
    "rank 64": (64, SEPARATE),
    "fused": (16, FUSED),
}


@pytest.mark.parametrize("convention", [None, "llama"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(compare_steps, device, dtype, shape, convention):
    check(compare_steps, shape, dtype, device, 16, SEPARATE, convention)


@pytest.mark.parametrize("convention", [None, "gemma"])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_updates(compare_steps, device, dtype, update, convention):
    check(compare_steps, (2, 9, 3, 2, 24, 16, 1), dtype, device, *update, convention)


@pytest.mark.slow
@pytest.mark.parametrize("convention", [None, *CONVENTIONS])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_and_updates(compare_steps, device, dtype, shape, update, convention):
    check(compare_steps, shape, dtype, device, *update, convention)


def test_fp32_tables(compare_steps, device, dtype):
    check(compare_steps, SHAPES["gqa"], dtype, device, 16, table_dtype=torch.float32)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    length=st.integers(1, 5),
    q=st.integers(1, 4),
    kv=st.integers(1, 3),
    pairs=st.integers(1, 9),
    rest=st.integers(0, 5),
    rank=st.sampled_from([None, 16, 32]),
    convention=st.sampled_from([None, *CONVENTIONS]),
)
def test_any_small_shape(compare_steps, device, batch, length, q, kv, pairs, rest, rank, convention):
    dim = max(2 * pairs + rest, 3)
    shape = (batch, length, q, kv, dim, 2 * pairs, 1)
    check(compare_steps, shape, torch.float32, device, rank, SEPARATE, convention)


LAYOUTS = {  # of the gradients [B, H, S, D], all with the same values
    "as attention gives them": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "channels sliced": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "last dim strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convention", [None, "llama"])
def test_layouts_of_the_gradients(compare_steps, device, dtype, layout, convention):
    check(compare_steps, (2, 5, 4, 2, 16, 12, 2), dtype, device, 16, SEPARATE, convention, LAYOUTS[layout])


def test_layouts_of_tables_and_of_the_small_product(device, dtype):
    shape, heads = (2, 6, 3, 2, 16, 16, 2), Heads(3, 2, 16)
    t = make(shape, dtype, device, 16)
    strided = {name: torch.cat((t[name], t[name]), 1)[:, : t[name].shape[1]] for name in ("cos", "sin", "xa")}
    turned = {name: t[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("cos", "sin")}
    expanded = {name: t[name][:1].expand(2, -1, -1) for name in ("cos", "sin")}
    first = {name: t[name][:1] for name in ("cos", "sin")}

    def call(**other):
        x = t | other
        return module.lora_rope(x["qkv"].clone(), x["cos"], x["sin"], heads, Update(x["xa"], x["b"], SEPARATE))

    assert torch.equal(call(**strided), call())
    assert torch.equal(call(**turned), call())
    assert torch.equal(call(**expanded), call(**first))


def test_more_heads_and_tokens_than_one_program(compare_steps, device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 64)
    check(compare_steps, (3, 17, 5, 2, 16, 16, 1), dtype, device, 16, SEPARATE, "llama")


@pytest.mark.parametrize("which", [module, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("convention", [None, "llama"])
def test_what_is_written_over(device, dtype, which, convention):
    heads = Heads(3, 2, 16)
    t = make((2, 5, 3, 2, 16, 12, 1), dtype, device, 16, norm=convention is not None)
    before = {name: x.clone() for name, x in t.items() if x is not None}
    update = Update(t["xa"], t["b"], SEPARATE)
    norm = HeadNorm(t["q_weight"], t["k_weight"], EPS) if convention else None
    out = which.lora_rope(t["qkv"], t["cos"], t["sin"], heads, update, norm)
    if norm is not None:
        assert torch.equal(t["qkv"], before["qkv"]), "the buffer was written over, and the backward needs it"
    elif which is module:
        assert out.data_ptr() == t["qkv"].data_ptr()
    grads = [x.unflatten(0, (2, 5)).transpose(1, 2) for x in segments(t["dout"], heads)]
    given = (t["qkv"], update, norm, True) if norm else ()
    which.lora_rope_backward(*grads, t["cos"], t["sin"], heads, *given)
    kept = before.keys() - ({"qkv"} if norm is None else set())
    assert [name for name in kept if not torch.equal(t[name], before[name])] == []


def test_weight_gradients_only_where_they_are_wanted(device):
    heads, shape = Heads(3, 2, 16), (2, 5, 3, 2, 16, 12, 1)
    for which in (module, reference):
        for sizes in (shape, (0, *shape[1:])):
            t = make(sizes, torch.float32, device, 16, norm=True)
            norm = HeadNorm(t["q_weight"], t["k_weight"], EPS)
            grads = [x.unflatten(0, (sizes[0], 5)).transpose(1, 2) for x in segments(t["dout"], heads)]
            arguments = (*grads, t["cos"], t["sin"], heads, t["qkv"], Update(t["xa"], t["b"], SEPARATE), norm)
            with_, without = which.lora_rope_backward(*arguments, True), which.lora_rope_backward(*arguments)
            assert without[1:] == (None, None)
            assert torch.equal(with_[0], without[0])
            assert [(x.dtype, tuple(x.shape)) for x in with_[1:]] == [(torch.float32, (16,))] * 2


def test_backward_inverts_a_true_rotation(device):
    heads = Heads(3, 2, 16)
    angles = torch.arange(9)[None, :, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).float().to(device) for f in (torch.cos, torch.sin))
    qkv = torch.randn(18, 7 * 16).to(device)
    out = module.lora_rope(qkv.clone(), cos, sin, heads)
    parts = [x.unflatten(0, (2, 9)).transpose(1, 2) for x in segments(out, heads)]
    back, _, _ = module.lora_rope_backward(*parts, cos, sin, heads)
    torch.testing.assert_close(back, qkv, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "token"])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_gradients_beyond_int32(huge, device, dim, stride):
    sizes, strides = [1, 1, 1, 16], [16, 16, 16, 1]
    sizes[dim], strides[dim] = 2**31 // stride + 1, stride
    heads = Heads(sizes[1], sizes[1], 16)
    far = [huge(sizes, strides) for _ in range(3)]
    cos, sin = (torch.randn(1, sizes[2], 16).to(device) for _ in range(2))
    results = [module.lora_rope_backward(*grads, cos, sin, heads)[0] for grads in (far, [x.clone() for x in far])]
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "token"])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_tables_and_updates_beyond_int32(huge, device, dim, stride):
    sizes, strides = [1, 1, 16], [16, 16, 1]
    sizes[dim], strides[dim] = 2**31 // stride + 1, stride
    tokens, heads = sizes[0] * sizes[1], Heads(1, 1, 16)
    cos, sin = huge(sizes, strides), huge(sizes, strides)
    xa = huge((tokens, 48), (stride, 1))
    qkv, b = torch.randn(tokens, 48).to(device).half(), torch.randn(48, 16).to(device).half()
    norm = HeadNorm(*torch.randn(2, 16).to(device).half(), EPS)
    grads = [torch.randn(sizes[0], 1, sizes[1], 16).to(device).half() for _ in range(3)]
    results = []
    for tensors in ((cos, sin, xa), (cos.clone(), sin.clone(), xa.clone())):
        update = Update(tensors[2], b, SEPARATE)
        out = module.lora_rope(qkv, *tensors[:2], heads, update, norm)
        back = module.lora_rope_backward(*grads, *tensors[:2], heads, qkv, update, norm, True)
        results.append((out, *back))
    assert all(map(torch.equal, *results))


class _Turned(torch.autograd.Function):
    """The twin's own backward as autograd's."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, rest):
        cos, sin, heads, update, convention = rest
        ctx.save_for_backward(qkv, q_weight, k_weight)
        ctx.rest = rest
        norm = HeadNorm(q_weight, k_weight, EPS, *CONVENTIONS[convention]) if convention else None
        return reference.lora_rope(qkv.clone(), cos, sin, heads, update, norm)

    @staticmethod
    def backward(ctx, dout):
        (qkv, q_weight, k_weight), (cos, sin, heads, update, convention) = ctx.saved_tensors, ctx.rest
        norm = HeadNorm(q_weight, k_weight, EPS, *CONVENTIONS[convention]) if convention else None
        grads = [x.unflatten(0, (-1, cos.shape[1])).transpose(1, 2) for x in segments(dout, heads)]
        return *reference.lora_rope_backward(*grads, cos, sin, heads, qkv, update, norm, norm is not None), None


@pytest.mark.parametrize("convention", [None, *CONVENTIONS])
def test_twin_passes_gradcheck(convention):
    heads, more = Heads(2, 1, 8), {"dtype": torch.float64}
    cos, sin = torch.randn(1, 3, 6, **more), torch.randn(1, 3, 6, **more)
    update = Update(torch.randn(6, 48, **more), torch.randn(32, 16, **more), SEPARATE)
    rest = cos, sin, heads, update, convention
    qkv, *weights = (torch.randn(*size, **more) for size in ((6, 32), (8,), (8,)))
    qkv.requires_grad_()
    inputs = [qkv, *(w.requires_grad_(convention is not None) for w in weights)]
    assert torch.autograd.gradcheck(lambda *t: _Turned.apply(*t, rest), inputs)
