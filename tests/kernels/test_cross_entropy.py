"""Cross entropy: losses, log-sum-exps, gradients and large vocabularies, against fp64 and against PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import cross_entropy as module
from ftcore_kernels.ops.cross_entropy import cross_entropy
from ftcore_kernels.reference.cross_entropy import cross_entropy as reference

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "smoothing": {"smoothing": 0.1},
    "all": {"softcap": 5.0, "scale": 2.0, "smoothing": 0.2, "ignore_index": 1},
}


def formula(labels, ignore_index=-100, softcap=0.0, scale=1.0, smoothing=0.0):
    """From the definition, without PyTorch's log-softmax."""
    labels = labels.cpu().long()

    def apply(logits):
        z = softcap * torch.tanh(scale * logits / softcap) if softcap else scale * logits
        highest = z.max(-1, keepdim=True).values.detach()
        lse = (z - highest).exp().sum(-1).log() + highest.squeeze(-1)
        q = F.one_hot(labels.clamp_min(0), z.shape[-1]) * (1 - smoothing) + smoothing / z.shape[-1]
        kept = labels != ignore_index
        return (lse - (q * z).sum(-1)) * kept, lse * kept

    return apply


def make(shape, dtype, device, ignored=0.3, ignore_index=-100):
    logits = torch.randn(shape).mul(3).to(device, dtype).requires_grad_()
    labels = torch.randint(shape[-1], shape[:-1])
    labels[torch.rand(labels.shape) < ignored] = ignore_index
    return logits, labels.to(device)


def check(compare, logits, labels, **options):
    compare(
        lambda logits: cross_entropy(logits, labels, **options),
        lambda logits: reference(logits, labels, **options),
        formula(labels, **options),
        (logits,),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 131), (2, 3, 64), (0, 8), (2, 0, 8)])
def test_values_and_gradients(compare, device, dtype, shape, options):
    check(compare, *make(shape, dtype, device, ignore_index=options.get("ignore_index", -100)), **options)


@pytest.mark.parametrize(
    "width", [32000, 151665, *(pytest.param(width, marks=pytest.mark.slow) for width in (128256, 262144))]
)
def test_large_vocabularies(compare, device, dtype, width):
    logits, labels = make((2, width), dtype, device, ignored=0)
    labels[-1] = width - 1
    check(compare, logits, labels, softcap=30.0)


VIEWS = {
    "sliced": lambda: torch.randn(6, 5, 33)[:, 1:],
    "shifted": lambda: torch.randn(3, 6, 17)[:, :-1],
    "transposed": lambda: torch.randn(7, 5).T,
    "three strides": lambda: torch.randn(4, 6, 8, 9)[1:3, ::2, 1:5],
    "padded vocabulary": lambda: torch.randn(5, 40)[:, :37],
    "expanded": lambda: torch.randn(1, 21).expand(4, 21),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(compare, device, dtype, view):
    logits = VIEWS[view]().to(device, dtype).requires_grad_()
    labels = torch.randint(logits.shape[-1], (*logits.shape[:-1], 2)).to(device)[..., 1]
    check(compare, logits, labels)
    check(compare, logits, labels.int())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 64),
    softcap=st.sampled_from([0.0, 2.0]),
    scale=st.sampled_from([1.0, 0.5]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_small_shape(compare, device, rows, width, softcap, scale, smoothing):
    logits, labels = make((rows, width), torch.float32, device)
    if width > 1:  # else every loss and gradient is a difference of equal numbers
        check(compare, logits, labels, softcap=softcap, scale=scale, smoothing=smoothing)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_of_several_blocks(compare, device, dtype, monkeypatch, options):
    monkeypatch.setattr(module, "_BLOCK", 16)
    check(compare, *make((5, 83), dtype, device, ignore_index=options.get("ignore_index", -100)), **options)


def test_ignored_rows_are_zero_whatever_their_logits(device, dtype):
    logits, labels = make((6, 40), dtype, device, ignored=0)
    labels[2:4] = -100
    with torch.no_grad():
        logits[2], logits[3] = math.nan, math.inf
    for function in (cross_entropy, reference):
        out = function(logits, labels)
        (grad,) = torch.autograd.grad([x.sum() for x in out], logits)
        for x in (*out, grad):
            assert x.isfinite().all()
            assert not x[2:4].any()
            assert x[:2].all()


def test_all_rows_ignored(device, dtype):
    logits, labels = make((3, 40), dtype, device, ignored=2)
    loss, lse = cross_entropy(logits, labels)
    assert not loss.any()
    assert not lse.any()
    assert not torch.autograd.grad(loss.sum(), logits)[0].any()


def test_masked_vocabulary(device, monkeypatch):
    """Entries of -inf, also a whole block of them, are as if they were not there."""
    monkeypatch.setattr(module, "_BLOCK", 16)
    logits, labels = make((4, 70), torch.float32, device, ignored=0)
    labels = labels % 20 + 40
    with torch.no_grad():
        logits[:, :35] = -math.inf
    inner = logits[:, 35:].detach().clone().requires_grad_()
    ours, theirs = cross_entropy(logits, labels), cross_entropy(inner, labels - 35)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out[0].sum(), x)[0] for out, x in ((ours, logits), (theirs, inner))]
    assert not grads[0][:, :35].any()
    torch.testing.assert_close(grads[0][:, 35:], grads[1])


@pytest.mark.parametrize("label", [-1, 40, 2**31 - 1])
def test_a_label_out_of_range_is_nan(device, dtype, label):
    logits, labels = make((3, 40), dtype, device, ignored=0)
    labels[1] = label
    loss, _ = cross_entropy(logits, labels)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss.sum(), logits)[0].isnan().all(1).tolist() == [False, True, False]


def test_large_offsets_do_not_cancel(device):
    logits, labels = make((5, 100), torch.float32, device, ignored=0)
    shifted = (logits.detach() + 2.0**12).requires_grad_()
    exact = formula(labels)(shifted.detach().cpu().double())[0]
    torch.testing.assert_close(cross_entropy(shifted, labels)[0].detach().cpu().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("z", [0.0, 1e-6, 0.1, 0.29, 0.31, 1.0, 30.0, 1e4])
def test_softcap_is_exact_at_any_size(device, z):
    """Two logits z and -z: the loss of the first is log(1 + exp(-2 cap tanh(z / cap)))."""
    logits = torch.tensor([[z, -z]], device=device, requires_grad=True)
    loss, lse = cross_entropy(logits, torch.tensor([0], device=device), softcap=1.0)
    exact = math.tanh(logits[0, 0].item())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * exact)), rel=1e-6)  # a GPU's exp is good to two units
    (grad,) = torch.autograd.grad(lse, logits)
    assert grad[0, 0].item() == pytest.approx((1 - exact**2) / (1 + math.exp(-2 * exact)), rel=1e-5, abs=1e-7)


def test_only_one_of_the_outputs_is_used(device, dtype):
    logits, labels = make((4, 30), dtype, device)
    for i in range(2):
        grads = [torch.autograd.grad(f(logits, labels)[i].sum(), logits)[0] for f in (cross_entropy, reference)]
        torch.testing.assert_close(*grads)


def test_inplace_backward_writes_over_the_logits(device, dtype):
    for make_logits in (lambda x: x.clone(), lambda x: x.repeat(1, 2)[:, :30], lambda x: x.T.clone().T):
        logits, labels = make((4, 30), dtype, device)
        expected = torch.autograd.grad(cross_entropy(logits, labels)[0].sum(), logits)[0]
        own = make_logits(logits.detach()).requires_grad_()
        loss, _ = cross_entropy(own, labels, inplace=True)
        (grad,) = torch.autograd.grad(loss.sum(), own, retain_graph=True)
        assert torch.equal(grad, expected)
        assert (grad.data_ptr() == own.data_ptr()) == (own.stride(-1) == 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss.sum(), own)


def test_saves_the_logits_and_one_number_per_row(device, dtype):
    saved = []
    logits, labels = make((6, 32), dtype, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        cross_entropy(logits, labels)
    assert [t.data_ptr() for t in saved[:2]] == [logits.data_ptr(), labels.data_ptr()]
    assert [(t.dtype, tuple(t.shape)) for t in saved[2:]] == [(torch.float32, (6,))]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, stride, inplace):
    rows = 2**31 // stride + 1
    logits = huge((rows, 8), (stride, 1)).requires_grad_()
    labels = torch.arange(rows, device=device) % 8
    if not inplace:
        check(compare, logits, labels)
    compact = logits.detach().clone().requires_grad_()
    ours, theirs = cross_entropy(logits, labels, inplace=inplace), cross_entropy(compact, labels)
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(torch.autograd.grad(ours[0].sum(), logits)[0], torch.autograd.grad(theirs[0].sum(), compact)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parity_with_torch(device, dtype, smoothing):
    logits, labels = make((9, 300), dtype, device)
    # The lines of transformers' ForCausalLMLoss.
    theirs = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    their_grad = torch.autograd.grad(theirs.sum(), logits)[0]
    same = reference(logits, labels, smoothing=smoothing)[0]
    assert torch.equal(same, theirs)
    assert torch.equal(torch.autograd.grad(same.sum(), logits)[0], their_grad)
    ours = cross_entropy(logits, labels, smoothing=smoothing)[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), logits)[0], their_grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_refusals(device):
    logits, labels = make((2, 8), torch.float32, device)
    for function in (cross_entropy, reference):
        with pytest.raises(ValueError, match="softcap is -1"):
            function(logits, labels, softcap=-1.0)
        with pytest.raises(ValueError, match="smoothing is 2"):
            function(logits, labels, smoothing=2.0)
        with pytest.raises(ValueError, match="labels have shape"):
            function(logits, labels[:1])
    with pytest.raises(TypeError, match=r"labels are torch\.float32"):
        cross_entropy(logits, labels.float())
    with pytest.raises(TypeError, match=r"logits is torch\.float64"):
        cross_entropy(logits.double(), labels)
