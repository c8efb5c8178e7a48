"""Fused linear cross entropy: loss, gradients, chunks, splits and empty batches, against fp64 and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import cross_entropy as rows_module
from ftcore_kernels.ops import linear_cross_entropy as module
from ftcore_kernels.ops.linear_cross_entropy import linear_cross_entropy
from ftcore_kernels.reference.linear_cross_entropy import linear_cross_entropy as reference

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "smoothing": {"smoothing": 0.1},
    "all": {"softcap": 5.0, "scale": 2.0, "smoothing": 0.2, "ignore_index": 1},
}


def formula(labels, normalizer, ignore_index=-100, softcap=0.0, scale=1.0, smoothing=0.0):
    """The full logits, and PyTorch's own loss of them."""
    labels = labels.cpu().long().flatten()

    def apply(hidden, weight, bias=None):
        z = scale * F.linear(hidden.flatten(0, -2), weight, bias)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        loss = F.cross_entropy(z, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum")
        return loss.reshape(1) / float(normalizer)

    return apply


class PowerOfTwo(torch.autograd.Function):
    """Round the upstream gradient to a power of two, as it is in training: another one costs one rounding more."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.sign() * upstream.abs().log2().round().exp2()


def make(shape, vocabulary, dtype, device, ignored=0.4, ignore_index=-100):
    hidden = torch.randn(shape).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, shape[-1]).mul(shape[-1] ** -0.5 * 2).to(device, dtype).requires_grad_()
    labels = torch.randint(vocabulary, shape[:-1])
    labels[torch.rand(labels.shape) < ignored] = ignore_index
    return hidden, weight, labels.to(device)


def check(compare, tensors, labels, normalizer=7.0, **options):
    form = {name: options[name] for name in ("ignore_index", "softcap", "scale", "smoothing") if name in options}

    def call(function):
        def apply(hidden, weight, bias=None):
            return PowerOfTwo.apply(function(hidden, weight, bias=bias, **options).reshape(1))

        return apply

    options |= {"labels": labels, "normalizer": normalizer}
    exact = formula(labels, normalizer, **form)
    compare(call(linear_cross_entropy), call(reference), lambda *x: PowerOfTwo.apply(exact(*x)), tensors)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "vocabulary"), [((7, 16), 131), ((2, 5, 33), 50)])
def test_loss_and_gradients(compare, device, dtype, shape, vocabulary, options):
    hidden, weight, labels = make(shape, vocabulary, dtype, device, ignore_index=options.get("ignore_index", -100))
    check(compare, (hidden, weight), labels, **options)


def test_bias(compare, device, dtype):
    hidden, weight, labels = make((9, 16), 40, dtype, device)
    bias = torch.randn(40).to(device, dtype).requires_grad_()
    check(compare, (hidden, weight, bias), labels, chunk=4)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_of_the_two_is_frozen(compare, device, dtype, trained):
    hidden, weight, labels = make((9, 16), 40, dtype, device)
    check(compare, (hidden, weight.detach()) if trained == "hidden" else (hidden.detach(), weight), labels)


def test_vocabulary_of_several_ragged_blocks(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(rows_module, "_BLOCK", 16)
    hidden, weight, labels = make((6, 8), 83, dtype, device)
    check(compare, (hidden, weight), labels, softcap=4.0)


def test_views(compare, device, dtype):
    hidden = torch.randn(12, 4, 8).to(device, dtype).transpose(0, 1)[:, ::2].requires_grad_()
    weight = torch.randn(8, 30).to(device, dtype).T.requires_grad_()
    labels = torch.randint(30, (4, 7)).to(device)[:, :-1].int()
    check(compare, (hidden, weight), labels)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), width=st.integers(1, 20), vocabulary=st.integers(2, 40), chunk=st.integers(1, 10))
def test_any_small_shape(compare, device, rows, width, vocabulary, chunk):
    hidden, weight, labels = make((rows, width), vocabulary, torch.float32, device, ignored=0.2)
    check(compare, (hidden, weight), labels, chunk=chunk)


def grads(tensors, labels, upstream=1.0, function=linear_cross_entropy, **options):
    loss = function(*tensors, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss * upstream, tensors)


def test_any_chunk_gives_the_same(device):
    hidden, weight, labels = make((23, 16), 50, torch.float32, device)
    expected = grads((hidden, weight), labels, normalizer=14.0)
    for chunk in (1, 2, 7, 13, 1024):
        for ours, theirs in zip(grads((hidden, weight), labels, normalizer=14.0, chunk=chunk), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_any_split_into_micro_batches_gives_the_same(device):
    hidden, weight, labels = make((12, 16), 50, torch.float32, device)
    loss, dhidden, dweight = grads((hidden, weight), labels, normalizer=7.0)
    for size in (1, 5):
        parts = [
            grads((h.detach().requires_grad_(), weight), part, normalizer=7.0)
            for h, part in zip(hidden.split(size), labels.split(size), strict=True)
        ]
        torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), dhidden, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sum(part[2] for part in parts), dweight, rtol=1e-6, atol=1e-6)


def test_ignored_rows_change_nothing(device, dtype):
    hidden, weight, labels = make((5, 16), 50, dtype, device, ignored=0)
    loss, dhidden, dweight = grads((hidden, weight), labels, normalizer=5.0)
    noise = torch.full_like(hidden[:2], math.inf)
    padded = torch.cat((noise, hidden.detach(), noise)).requires_grad_()
    ignored = torch.full_like(labels[:2], -100)
    other = grads((padded, weight), torch.cat((ignored, labels, ignored)), normalizer=5.0)
    assert torch.equal(other[0], loss)
    assert torch.equal(other[1][2:-2], dhidden)
    assert torch.equal(other[2], dweight)
    assert not other[1][:2].any()
    assert not other[1][-2:].any()


def test_only_the_last_row_is_supervised(device, dtype):
    hidden, weight, labels = make((3, 8, 16), 50, dtype, device, ignored=2)
    labels[:, -1] = 3
    _, dhidden, dweight = grads((hidden, weight), labels, normalizer=3.0)
    assert dhidden[:, -1].any(-1).all()
    assert not dhidden[:, :-1].any()
    assert dweight.any()


@pytest.mark.parametrize("normalizer", [0.0, 5.0])
@pytest.mark.parametrize("given_rows", [None, 0, 3])
@pytest.mark.parametrize("shape", [(6, 16), (0, 16)])
def test_no_supervised_row(device, dtype, normalizer, given_rows, shape):
    hidden, weight, labels = make(shape, 50, dtype, device, ignored=2)
    rows = None if given_rows is None else torch.arange(min(given_rows, len(hidden)), device=device)
    for function in (linear_cross_entropy, reference):
        for divisor in (normalizer, torch.tensor(normalizer, device=device)):
            loss, dhidden, dweight = grads((hidden, weight), labels, function=function, normalizer=divisor, rows=rows)
            assert loss.item() == 0
            assert torch.equal(dhidden, torch.zeros_like(hidden))
            assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("padding", [0, 3])
def test_rows_may_be_given(device, dtype, monkeypatch, padding):
    hidden, weight, labels = make((3, 4, 16), 50, dtype, device)
    expected = grads((hidden, weight), labels, normalizer=5.0)
    flat = labels.flatten()
    rows = torch.cat((torch.nonzero(flat != -100)[:, 0], torch.nonzero(flat == -100)[:padding, 0]))
    monkeypatch.setattr(module, "supervised_rows", None)  # nothing is looked up
    # Another number of rows may be another matrix product to cuBLAS.
    tolerance = 4 * torch.finfo(dtype).eps if padding else 0.0
    for ours, theirs in zip(grads((hidden, weight), labels, normalizer=5.0, rows=rows), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_tensor_normalizer_and_upstream_gradient(device, dtype):
    hidden, weight, labels = make((9, 16), 50, dtype, device)
    expected = grads((hidden, weight), labels, normalizer=6.0)
    for divisor in (torch.tensor(6, device=device), torch.tensor([6.0], device=device)):
        assert all(map(torch.equal, grads((hidden, weight), labels, normalizer=divisor), expected))
    _, *scaled = grads((hidden, weight), labels, upstream=2.0**-3, normalizer=6.0)
    for ours, theirs in zip(scaled, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs / 8)


def test_fp16_gradients_survive_a_large_normalizer(device):
    """The gradient of a row over 2^18 tokens is lost in fp16, unless what a loss scale gives back is kept."""
    hidden, weight, labels = make((9, 16), 50, torch.float16, device)
    _, *plain = grads((hidden, weight), labels, normalizer=1.0)
    _, *scaled = grads((hidden, weight), labels, upstream=2.0**18, normalizer=2.0**18)
    assert all(map(torch.equal, plain, scaled))


def test_an_upstream_gradient_is_not_rounded_to_16_bits(device):
    hidden, weight, labels = make((64, 16), 50, torch.float16, device, ignored=0)
    _, dhidden, _ = grads((hidden, weight), labels, normalizer=1.0)
    _, scaled, _ = grads((hidden, weight), labels, upstream=1.0004, normalizer=1.0)
    assert torch.equal(scaled, (dhidden.float() * 1.0004).half())


def test_tied_weights(device):
    _, weight, labels = make((9, 16), 50, torch.float32, device)
    tokens = torch.randint(50, (9,), device=device)

    def gradient(function):
        hidden = F.embedding(tokens, weight) * 2
        return torch.autograd.grad(function(hidden, weight, labels, normalizer=5.0), weight)[0]

    torch.testing.assert_close(gradient(linear_cross_entropy), gradient(reference), rtol=1e-5, atol=1e-6)


def test_never_more_logits_than_a_chunk(device, monkeypatch):
    hidden, weight, labels = make((20, 16), 50, torch.float32, device, ignored=0)
    seen = []
    project = module.project
    monkeypatch.setattr(module, "project", lambda h, *rest: seen.append(len(h)) or project(h, *rest))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels, normalizer=5.0, chunk=6)
    assert seen == [6, 6, 6, 2]
    assert all(tensor.shape in (hidden.shape, weight.shape, labels.shape, ()) for tensor in saved)


def test_no_gradient_work_without_gradients(device, monkeypatch):
    hidden, weight, labels = make((9, 16), 50, torch.float32, device)
    expected = linear_cross_entropy(hidden, weight, labels, normalizer=5.0)
    monkeypatch.setattr(module, "gradients", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, normalizer=5.0), expected)
    assert torch.equal(linear_cross_entropy(hidden.detach(), weight.detach(), labels, normalizer=5.0), expected)


def test_metrics(device, dtype):
    hidden, weight, labels = make((2, 9, 16), 50, dtype, device)
    flat = labels.flatten()
    z = hidden.detach().flatten(0, 1).double() @ weight.detach().T.double()
    with torch.no_grad():  # some are right
        rows = torch.nonzero(flat != -100)[:, 0]
        flat[rows[::2]] = z.argmax(-1)[rows[::2]]
    p = z.softmax(-1)
    for function in (linear_cross_entropy, reference):
        metrics = {}
        function(hidden, weight, labels, normalizer=5.0, metrics=metrics, chunk=4)
        assert torch.equal(metrics["rows"], rows)
        assert torch.equal(metrics["top1"], (z.argmax(-1) == flat)[rows])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            metrics["entropy"].double(), -(p * p.log()).sum(-1)[rows], rtol=tolerance, atol=tolerance
        )
        padded = {}
        every = torch.arange(flat.numel(), device=device)
        function(hidden, weight, labels, normalizer=5.0, metrics=padded, rows=every)
        assert not padded["top1"][flat == -100].any()
        assert not padded["entropy"][flat == -100].any()


def test_under_autocast(device):
    hidden, weight, labels = make((9, 16), 50, torch.float32, device)
    expected = grads((hidden, weight), labels, normalizer=5.0)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(map(torch.equal, grads((hidden, weight), labels, normalizer=5.0), expected))


def test_refusals(device):
    hidden, weight, labels = make((9, 16), 50, torch.float32, device)
    with pytest.raises(TypeError, match="needs one dtype"):
        linear_cross_entropy(hidden, weight.half(), labels, normalizer=1.0)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_cross_entropy(hidden, weight.T, labels, normalizer=1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        linear_cross_entropy(hidden, weight, labels, normalizer=1.0, bias=hidden[0])
    for function in (linear_cross_entropy, reference):
        with pytest.raises(ValueError, match="chunk is 0"):
            function(hidden, weight, labels, normalizer=1.0, chunk=0)
        with pytest.raises(ValueError, match="labels have shape"):
            function(hidden, weight, labels[:3], normalizer=1.0)
