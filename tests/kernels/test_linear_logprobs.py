"""Chunked log-probabilities: values, gradients, chunks and rows, against fp64 and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import cross_entropy as rows_module
from ftcore_kernels.ops import linear_logprobs as module
from ftcore_kernels.ops.linear_logprobs import linear_logprobs
from ftcore_kernels.reference.linear_logprobs import linear_logprobs as reference

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"temperature": 1.5, "softcap": 5.0, "scale": 2.0, "ignore_index": 1},
}


def formula(targets, temperature=1.0, softcap=0.0, scale=1.0, ignore_index=-100):
    targets = targets.cpu().long()

    def apply(hidden, weight, bias=None):
        z = scale * F.linear(hidden, weight, bias)
        z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
        kept = targets != ignore_index
        return z.log_softmax(-1).gather(-1, targets.where(kept, 0)[..., None])[..., 0] * kept

    return apply


def make(shape, vocabulary, dtype, device, ignored=0.3, ignore_index=-100):
    hidden = torch.randn(shape).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, shape[-1]).mul(shape[-1] ** -0.5 * 2).to(device, dtype).requires_grad_()
    targets = torch.randint(vocabulary, shape[:-1])
    targets[torch.rand(targets.shape) < ignored] = ignore_index
    return hidden, weight, targets.to(device)


def check(compare, tensors, targets, chunk=1024, **options):
    def call(function):
        def apply(hidden, weight, bias=None):
            return function(hidden, weight, targets, bias=bias, chunk=chunk, **options)

        return apply

    compare(call(linear_logprobs), call(reference), formula(targets, **options), tensors)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "vocabulary"), [((7, 16), 131), ((2, 5, 33), 50), ((0, 8), 5)])
def test_values_and_gradients(compare, device, dtype, shape, vocabulary, options):
    hidden, weight, targets = make(shape, vocabulary, dtype, device, ignore_index=options.get("ignore_index", -100))
    check(compare, (hidden, weight), targets, **options)


def test_bias(compare, device, dtype):
    hidden, weight, targets = make((9, 16), 40, dtype, device)
    bias = torch.randn(40).to(device, dtype).requires_grad_()
    check(compare, (hidden, weight, bias), targets, chunk=4)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_one_of_the_two_is_frozen(compare, device, dtype, trained):
    hidden, weight, targets = make((9, 16), 40, dtype, device)
    check(compare, (hidden, weight.detach()) if trained == "hidden" else (hidden.detach(), weight), targets)


def test_vocabulary_of_several_ragged_blocks(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(rows_module, "_BLOCK", 16)
    hidden, weight, targets = make((6, 8), 83, dtype, device)
    check(compare, (hidden, weight), targets, softcap=4.0)


def test_views(compare, device, dtype):
    hidden = torch.randn(12, 4, 8).to(device, dtype).transpose(0, 1)[:, ::2].requires_grad_()
    weight = torch.randn(8, 30).to(device, dtype).T.requires_grad_()
    check(compare, (hidden, weight), torch.randint(30, (4, 7)).to(device)[:, :-1].int())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), width=st.integers(1, 20), vocabulary=st.integers(2, 40), chunk=st.integers(1, 10))
def test_any_small_shape(compare, device, rows, width, vocabulary, chunk):
    hidden, weight, targets = make((rows, width), vocabulary, torch.float32, device, ignored=0.2)
    check(compare, (hidden, weight), targets, chunk=chunk)


def test_any_chunk_gives_the_same(device):
    hidden, weight, targets = make((23, 16), 50, torch.float32, device)
    upstream = torch.randn(23).to(device)

    def run(chunk):
        out = linear_logprobs(hidden, weight, targets, chunk=chunk)
        return out.detach(), *torch.autograd.grad(out, (hidden, weight), upstream)

    expected = run(1024)
    for chunk in (1, 7, 13):
        for ours, theirs in zip(run(chunk), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


def test_rows_not_taken_are_zero(device, dtype, monkeypatch):
    hidden, weight, targets = make((3, 4, 16), 50, dtype, device, ignored=0)
    with torch.no_grad():
        hidden[0, 0] = math.nan
    rows = torch.tensor([1, 5, 11, 7], device=device)
    monkeypatch.setattr(module, "supervised_rows", None)  # nothing is looked up
    out, same = (f(hidden, weight, targets, rows=rows) for f in (linear_logprobs, reference))
    torch.testing.assert_close(out, same, rtol=1e-2, atol=1e-2)
    assert sorted(torch.nonzero(out.flatten())[:, 0].tolist()) == [1, 5, 7, 11]
    for x in (out, same):
        dhidden, dweight = torch.autograd.grad(x.sum(), (hidden, weight))
        assert sorted(torch.nonzero(dhidden.flatten(0, 1).any(1))[:, 0].tolist()) == [1, 5, 7, 11]
        assert dweight.isfinite().all()


def test_saves_its_inputs_and_one_number_per_row(device, dtype):
    saved = []
    hidden, weight, targets = make((6, 16), 50, dtype, device, ignored=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_logprobs(hidden, weight, targets)
    assert [t.data_ptr() for t in saved[:2]] == [hidden.data_ptr(), weight.data_ptr()]
    assert [tuple(t.shape) for t in saved[2:]] == [(6,)] * 3


def test_metrics(device, dtype):
    hidden, weight, targets = make((2, 9, 16), 50, dtype, device)
    z = hidden.detach().double() @ weight.detach().T.double() / 0.7
    targets[0] = z[0].argmax(-1)
    kept = targets != -100
    p = z.softmax(-1)
    for function in (linear_logprobs, reference):
        metrics = {}
        out = function(hidden, weight, targets, temperature=0.7, metrics=metrics, chunk=4)
        assert torch.equal(metrics["top1"], (z.argmax(-1) == targets) & kept)
        assert not metrics["entropy"].requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        expected = -(p * p.log()).sum(-1) * kept
        torch.testing.assert_close(metrics["entropy"].double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(out, function(hidden, weight, targets, temperature=0.7, chunk=4))


def test_preference_loss_of_equal_policies_is_log_2(device):
    hidden, weight, targets = make((2, 9, 16), 50, torch.float32, device)
    with torch.no_grad():
        before = linear_logprobs(hidden, weight, targets)
    margin = (linear_logprobs(hidden, weight, targets) - before).sum(1)
    loss = -F.logsigmoid(0.1 * (margin[0] - margin[1]))
    assert loss.item() == pytest.approx(math.log(2))
    # d loss / d logp = -+ 0.1 / 2
    factors = torch.tensor([[-0.05], [0.05]], device=device).expand(2, 9)
    expected = torch.autograd.grad(reference(hidden, weight, targets), hidden, factors)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), expected, rtol=1e-5, atol=1e-6)


def test_refusals(device):
    hidden, weight, targets = make((9, 16), 50, torch.float32, device)
    for function in (linear_logprobs, reference):
        with pytest.raises(ValueError, match="temperature is 0"):
            function(hidden, weight, targets, temperature=0.0)
        with pytest.raises(ValueError, match="labels have shape"):
            function(hidden, weight, targets[:3])
    with pytest.raises(TypeError, match="needs one dtype"):
        linear_logprobs(hidden, weight.half(), targets)
