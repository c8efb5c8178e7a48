"""Layer inputs in host memory: the same gradients, no copy too early or too late, no memory kept for nothing."""

from __future__ import annotations

import gc
import sys
import weakref
from itertools import pairwise

import psutil
import pytest
import torch
from decoders import DEVICE, LEVELS, batch, keep, layers, manual, pair
from hypothesis import given
from hypothesis import strategies as st
from late_copies import delay
from test_decoder_layer import assert_same

from ftcore import host_memory
from ftcore.host_memory import NoHostMemory
from ftcore_kernels.layers.decoder import host as module
from ftcore_kernels.layers.decoder import pinned, recompute
from ftcore_kernels.layers.decoder.host import IN_TRANSIT, Host, Pinned
from ftcore_kernels.layers.decoder.pinned import GROWTH, Arena

CUDA = DEVICE.type == "cuda"


@pytest.fixture
def host(monkeypatch) -> Host:
    """One for this test alone, that the layers use too."""
    mine = Host(DEVICE)
    monkeypatch.setattr(recompute, "host_of", lambda device: mine)
    monkeypatch.setattr(recompute, "busy_host", lambda device: mine if mine.busy else None)
    return mine


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request, host, monkeypatch) -> None:
    """Every copy is made as late as may be, so that whoever does not wait for it reads something else."""
    if request.param:
        delay(host, monkeypatch)


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


def test_what_stays_is_there_and_what_was_sent_before_it_leaves(host) -> None:
    sent = [host.send(torch.randn(8, device=DEVICE)) for _ in range(2)]
    tensors = [torch.randn(8, device=DEVICE) for _ in range(2)]
    stays = [host.keep(tensor) for tensor in tensors]
    assert [item._source is None for item in (*sent, *stays)] == [True, True, False, False]
    assert host.booked == 2 * 32
    assert stays[1].take() is tensors[1]
    assert sent[1]._arriving is None, "not before it is the next one"
    assert stays[0].take() is tensors[0]
    assert sent[1]._arriving is not None


def test_a_forward_that_is_given_up_leaves_nothing_on_the_device(host) -> None:
    away = [host.send(torch.randn(8, device=DEVICE)) for _ in range(4)]
    assert host.busy
    left = weakref.ref(away[-1])
    del away
    gc.collect()
    assert left() is None
    assert not host.busy


def test_host_memory_is_used_again(host) -> None:
    for _ in range(3):
        away = [host.send(torch.randn(100, device=DEVICE)) for _ in range(5)]
        for item in reversed(away):
            item.take()
        del away, item
    assert host.booked == host.arena.free == 5 * 400
    abandoned = [host.send(torch.randn(100, device=DEVICE)) for _ in range(5)]
    assert host.booked == 5 * 400
    assert host.arena.free == 0
    del abandoned
    gc.collect()
    assert host.booked == host.arena.free == 5 * 400


def test_fifty_steps_of_any_shapes_book_what_the_largest_needs(host, late) -> None:
    """Within a hundredth, and every tensor comes back as it was."""
    generator = torch.Generator().manual_seed(0)
    sizes = [[int(n) for n in torch.randint(1, 4000, (5,), generator=generator)] for _ in range(50)]
    for of_step in sizes:
        tensors = [torch.rand(size, device=DEVICE) for size in of_step]
        copies, away = [tensor.clone() for tensor in tensors], []
        while tensors:
            away.append(host.send(tensors.pop(0)))
        for item, expected in zip(reversed(away), reversed(copies), strict=True):
            assert torch.equal(item.take(), expected)
        del away, item
    largest = 4 * max(map(sum, sizes))
    assert largest <= host.booked <= 1.01 * largest
    assert host.arena.free == host.booked


@pytest.mark.parametrize("settled", [False, True])
def test_an_input_that_was_written_over_raises(host, settled) -> None:
    tensor = torch.randn(4, device=DEVICE)
    away = host.send(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="written over"):
        away.settle() if settled else away.take()


def test_one_host_for_each_device() -> None:
    assert module.host_of(DEVICE) is module.host_of(DEVICE)
    assert module.busy_host(DEVICE) is None
    away = module.host_of(DEVICE).send(torch.zeros(3, device=DEVICE))
    assert module.busy_host(DEVICE) is module.host_of(DEVICE)
    away.take()
    assert module.busy_host(DEVICE) is None


# Host memory -------------------------------------------------------------------------------------------------------


class Block:
    """Memory that nobody has to touch."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device="meta")


@given(st.lists(st.tuples(st.integers(0, 10_000), st.booleans(), st.integers(0, 5)), max_size=40))
def test_what_is_booked_is_what_was_needed_at_once(requests) -> None:
    """In any order of taking and giving back; nothing is handed out twice."""
    arena, taken, most = Arena(DEVICE, Block), [], 0
    for size, give, which in requests:
        if give and taken:
            arena.give(taken.pop(which % len(taken)))
            continue
        taken.append(arena.take(size))
        assert sum(piece.end - piece.start for piece in taken[-1]) == size
        pieces = sorted(piece for of_request in taken for piece in of_request)
        assert all(one.block != two.block or one.end <= two.start for one, two in pairwise(pieces))
        most = max(most, sum(piece.end - piece.start for piece in pieces))
    assert most <= arena.booked <= most + len(requests) * (arena.booked // GROWTH)
    while taken:
        arena.give(taken.pop())
    assert arena.free == arena.booked
    assert len(arena._free) == len(arena._blocks), "what adjoins is one piece"


def test_a_larger_batch_takes_what_is_missing(host) -> None:
    for size, booked in ((1000, 1000), (600, 1000), (1500, 1500), (1501, 1505), (1505, 1505)):
        host.arena.give(host.arena.take(size))
        assert host.booked == booked, "by a part of 256 at least"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_system_counts_the_same_bytes() -> None:
    """Within a hundredth, and gets them back."""

    def resident() -> int:
        return psutil.Process().memory_info().rss

    size = 2**26 + 12_345
    before = resident()
    slot = Pinned(size, DEVICE)
    slot.bytes.fill_(1)
    assert resident() - before == pytest.approx(size, rel=0.01, abs=2**19)
    del slot
    gc.collect()
    assert resident() - before < 2**21


def test_memory_that_is_not_there_is_asked_for_before_it_is_taken(host, monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: host_memory.SPARE + 1000)
    away = host.send(torch.zeros(250, device=DEVICE))
    with pytest.raises(NoHostMemory, match=r"the host has 1000 B of memory left, and 1\.0 KiB more are needed there"):
        host.send(torch.zeros(257, device=DEVICE))
    assert torch.equal(away.take().cpu(), torch.zeros(250)), "what was sent before is not lost"


def test_memory_that_may_not_be_locked_is_used_as_it_is_and_that_is_said_once(monkeypatch, capsys) -> None:
    calls = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(size)
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(pinned, "_forget_error", lambda device: None)
    pinned.say_unlocked.cache_clear()
    slots = [Pinned(size, torch.device("cuda")) for size in (100, 200)]
    assert calls == [100, 200]
    assert not any(slot.locked for slot in slots)
    said = capsys.readouterr().out
    assert said.count("cannot be locked for the GPU (CUDA error 2; the limit of locked memory is ") == 1
    assert said.count("ulimit -l unlimited") == 1
    slots[0].bytes.fill_(3)
    assert int(slots[0].bytes.sum()) == 300


@pytest.mark.skipif(not CUDA, reason="memory is pinned for a GPU")
def test_pinned_memory_is_exact_and_given_back() -> None:
    slot = Pinned(5_000_001, DEVICE)
    assert slot.bytes.is_pinned() and slot.bytes.numel() == 5_000_001
    kept = slot.bytes
    del slot
    gc.collect()
    assert not kept.is_pinned()


@pytest.mark.skipif(not CUDA, reason="memory is locked for a GPU")
def test_an_error_of_locking_is_nobody_elses() -> None:
    slot = Pinned(4096, DEVICE)
    assert slot.locked
    assert int(torch.cuda.cudart().cudaHostRegister(slot.bytes.data_ptr(), 4096, 0)) != 0, "it is already"
    pinned._forget_error(DEVICE)
    assert float(torch.ones(3, device=DEVICE).sum()) == 3
