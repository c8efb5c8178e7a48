"""Layer inputs in host memory: the same gradients, no copy too early or too late, no memory kept for nothing."""

from __future__ import annotations

import gc

import pytest
import torch
from decoders import DEVICE, LEVELS, batch, keep, layers, manual, pair
from test_decoder_layer import assert_same

from ftcore_kernels.layers.decoder import host as module
from ftcore_kernels.layers.decoder.host import IN_TRANSIT, Host, Pinned

CUDA = DEVICE.type == "cuda"


@pytest.fixture
def host(monkeypatch) -> Host:
    """One for this test alone, that the layers use too."""
    mine = Host(DEVICE)
    monkeypatch.setattr("ftcore_kernels.layers.decoder.recompute.host_of", lambda device: mine)
    return mine


@pytest.fixture(params=[False, *([True] if CUDA else [])], ids=["at once", *(["late"] if CUDA else [])])
def late(request, monkeypatch) -> None:
    """Every copy begins long after it was asked for, so that whoever does not wait for it reads something else."""
    if request.param:
        copy = torch.Tensor.copy_

        def slow(self, source, non_blocking=False):
            torch.cuda._sleep(20_000_000)
            return copy(self, source, non_blocking)

        monkeypatch.setattr(torch.Tensor, "copy_", slow)


def send_away(model) -> None:
    for layer in layers(model):
        layer.ftcore_recompute.away = True


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_are_the_same(family, level, host) -> None:
    plain, ours = (
        pair(family, num_hidden_layers=6, layer_types=None) if family == "gemma3" else pair(num_hidden_layers=6)
    )
    keep(ours, level)
    send_away(ours)
    assert_same(plain, manual(ours, batch()), batch())
    assert host.booked > 0, "nothing was sent"


def test_forwards_and_backwards_in_any_order(host, late) -> None:
    """Two batches before their backwards, and one without a backward between them."""
    plain, ours = pair(num_hidden_layers=6)
    send_away(ours)
    batches = [batch(3, 11), batch(2, 9), batch(3, 11)]
    found = []
    for model in (plain, ours):
        model.zero_grad()
        first, dropped, last = (model(**data).loss for data in batches)
        del dropped
        gc.collect()
        (first + 2 * last).backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_tensors_come_back_as_they_were(host, late) -> None:
    tensors = [torch.randn(64, 128, device=DEVICE) for _ in range(7)]
    copies = [tensor.clone() for tensor in tensors]
    away = []
    while tensors:
        away.append(host.send(tensors.pop(0)))
        torch.full((64, 128), 7.0, device=DEVICE)  # takes the memory that was let go, if any was
    for tensor, expected in zip(reversed(away), reversed(copies), strict=True):
        assert torch.equal(tensor.take(), expected)


def test_memory_on_the_device_is_let_go(host) -> None:
    tensors = [torch.randn(8, device=DEVICE) for _ in range(6)]
    away = [host.send(tensor) for tensor in tensors]
    assert [item._source is not None for item in away] == [False] * (6 - 1 - IN_TRANSIT) + [True] * (1 + IN_TRANSIT)


def test_host_memory_is_used_again(host) -> None:
    for _ in range(3):
        away = [host.send(torch.randn(100, device=DEVICE)) for _ in range(5)]
        for item in reversed(away):
            item.take()
        del away, item
        host.over()
    assert host.booked == 5 * 400
    abandoned = [host.send(torch.randn(100, device=DEVICE)) for _ in range(5)]
    assert host.booked == 0
    del abandoned
    host.over()
    gc.collect()
    assert host.booked == 5 * 400


@pytest.mark.parametrize("settled", [False, True])
def test_an_input_that_was_written_over_raises(host, settled) -> None:
    tensor = torch.randn(4, device=DEVICE)
    away = host.send(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="written over"):
        away.settle() if settled else away.take()


def test_one_host_for_each_device() -> None:
    assert module.host_of(DEVICE) is module.host_of(DEVICE)


@pytest.mark.skipif(not CUDA, reason="memory is pinned for a GPU")
def test_pinned_memory_is_exact_and_given_back() -> None:
    slot = Pinned(5_000_001, DEVICE)
    assert slot.bytes.is_pinned() and slot.bytes.numel() == 5_000_001
    kept = slot.bytes
    del slot
    gc.collect()
    assert not kept.is_pinned()
