"""Two-level checkpointing: layers whose inputs are made again have the same gradients, to the last bit."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import DEVICE, adapt, base, batch, build, keep, layers, manual, own_forwards, pair, patched
from late_copies import delay
from test_decoder_layer import assert_same

from ftcore.memory import layers_that_choose
from ftcore.planner import Lean
from ftcore.store import STAY, Sizes, Store, sizes, stored
from ftcore.testing import maths
from ftcore_kernels.layers.decoder import function, recompute, segments, steps
from ftcore_kernels.layers.decoder.attention import Differentiated
from ftcore_kernels.layers.decoder.host import Away, Host
from ftcore_kernels.layers.decoder.recompute import Recompute

LAYERS = 7
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """On a GPU some sums have no order of their own, that of an embedding's gradient among them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(DEVICE.type == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def host(monkeypatch) -> Host:
    """One for this test alone."""
    mine = Host(DEVICE)
    monkeypatch.setattr(recompute, "host_of", lambda device: mine)
    monkeypatch.setattr(recompute, "busy_host", lambda device: mine if mine.busy else None)
    return mine


@pytest.fixture
def again(monkeypatch) -> list[None]:
    """Grows with every forward that is computed again."""
    calls: list[None] = []
    forward = segments.steps.forward

    def counted(*args: Any) -> Any:
        calls.append(None)
        return forward(*args)

    monkeypatch.setattr(segments, "steps", SimpleNamespace(forward=counted))
    return calls


@functools.cache
def models(family: str = "llama", lora: bool = True) -> tuple[Any, Any]:
    """Untouched and claimed, of `LAYERS` layers."""
    more = {"layer_types": None} if family == "gemma3" else {}
    return pair(family, lora=None if lora else False, num_hidden_layers=LAYERS, **more)


def one_level(model: Any, level: int = 0) -> None:
    keep(model, level)
    for layer in layers(model):
        chosen = layer.ftcore_recompute
        chosen.inside = chosen.away = chosen.attended = False


def spread(model: Any, kept: int, away: int, attended: int = 0) -> Store:
    """So many inputs are kept, and so many of them in host memory, and of so many layers what attention gave."""
    one_level(model)
    store = replace(Store.of(LAYERS, kept, away), attended=attended)
    for layer in layers(model)[:attended]:
        layer.ftcore_recompute.attended = True
    for layer in layers(model):
        layer.ftcore_recompute.inside = True
    for place, start in enumerate(store.starts):
        chosen = layers(model)[start].ftcore_recompute
        chosen.inside, chosen.away = False, place < store.away
    return store


def packed() -> dict[str, torch.Tensor]:
    """A row of three documents."""
    ids = batch(1, 24)["input_ids"]
    where = torch.cat([torch.arange(n) for n in (9, 4, 11)])[None].to(DEVICE)
    return {"input_ids": ids, "position_ids": where, "labels": torch.where(where == 0, -100, ids)}


BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {"rows": batch, "packed": packed}


def assert_equal(found: Any, expected: Any) -> None:
    """To the last bit; every parameter has a gradient that is not nothing."""
    assert torch.equal(found[0], expected[0])
    assert set(found[1]) == set(expected[1])
    assert [name for name, gradient in expected[1].items() if not gradient.any()] == []
    assert [name for name, gradient in expected[1].items() if not torch.equal(found[1][name], gradient)] == []


@functools.cache
def plain(family: str, lora: bool, data: str) -> Found:
    """Everything kept, on the device, in one piece."""
    untouched, ours = models(family, lora)
    one_level(ours, 4)
    found = manual(ours, BATCHES[data]())
    assert_same(untouched, found, BATCHES[data]())
    return found


@pytest.mark.parametrize(("kept", "away"), [(7, 7), (6, 6), (5, 5), (3, 0), (1, 0)])
@pytest.mark.parametrize("data", BATCHES)
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_same_to_the_last_bit(family, lora, data, kept, away, host, again) -> None:
    """And as many inputs are in host memory, and as many layers computed again, as the store says."""
    expected = plain(family, lora, data)
    _, ours = models(family, lora)
    store = spread(ours, kept, away)
    assert_equal(manual(ours, BATCHES[data]()), expected)
    assert len(again) == store.made_again == LAYERS - kept
    tokens = BATCHES[data]()["input_ids"].numel()
    assert host.booked == store.host_bytes(Sizes(4 * tokens * ours.config.hidden_size))


@pytest.mark.parametrize(("kept", "away"), [(6, 6), (3, 1)])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_tiles(family, group, kept, away, monkeypatch) -> None:
    """And in groups of heads. Sums over tiles have an order of their own: compared are tiles with tiles."""
    monkeypatch.setattr(Recompute, "tile", lambda self, hidden: 7)
    monkeypatch.setattr(Recompute, "group", lambda self, hidden: group)
    untouched, ours = models(family)
    one_level(ours)
    expected = manual(ours, batch())
    assert_same(untouched, expected, batch())
    spread(ours, kept, away)
    assert_equal(manual(ours, batch()), expected)


@pytest.mark.parametrize(("kept", "away", "attended"), [(7, 7, 0), (6, 6, 0), (5, 5, 0), (7, 5, 6), (7, 7, 7)])
def test_late_copies(kept, away, attended, host, monkeypatch) -> None:
    """Two shapes, turn about: memory on the host is used again by other rows."""
    _, ours = models()
    shapes = [(3, 11), (2, 9), (1, 30), (3, 11)]
    one_level(ours)
    expected = [manual(ours, batch(*shape)) for shape in shapes]
    spread(ours, kept, away, attended)
    delay(host, monkeypatch)
    for shape, of_shape in zip(shapes, expected, strict=True):
        assert_equal(manual(ours, batch(*shape)), of_shape)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(("kept", "attended"), [(5, 0), (7, 6)])
def test_batches_that_overlap(kept, attended, late, host, monkeypatch) -> None:
    """Accumulated; two forwards before their backwards in either order; one forgotten, one evaluated between them."""
    _, ours = models()
    sizes = [(3, 11), (2, 9), (1, 14), (4, 5)]

    def gradients() -> dict[str, torch.Tensor]:
        ours.zero_grad()
        first, second, dropped, third = (ours(**batch(*size)).loss for size in sizes)
        del dropped
        with torch.no_grad():
            ours(**batch(2, 20))
        third.backward()
        first.backward()
        gc.collect()
        second.backward()
        return {name: p.grad.cpu().clone() for name, p in ours.named_parameters() if p.grad is not None}

    one_level(ours)
    expected = gradients()
    spread(ours, kept, 5, attended)
    if late:
        delay(host, monkeypatch)
    found = gradients()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_under_autocast(again) -> None:
    """32-bit weights are not for this layer under autocast; 16-bit ones are, and autocast changes nothing."""
    _, ours = pair(num_hidden_layers=LAYERS)
    ours = ours.to(torch.bfloat16)

    def step() -> Found:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return manual(ours, batch())

    one_level(ours)
    expected = step()
    spread(ours, 3, 2)
    assert_equal(step(), expected)
    assert len(again) == LAYERS - 3


# What attention gave -----------------------------------------------------------------------------------------------


@pytest.fixture
def attends(monkeypatch) -> list[None]:
    """Grows with every forward through attention: in 32 bits no library's kernel computes it, on a GPU neither."""
    calls: list[None] = []
    own = Differentiated.forward

    def counted(self: Any, *tensors: torch.Tensor) -> Any:
        calls.append(None)
        return own(self, *tensors)

    monkeypatch.setattr(Differentiated, "forward", counted)
    return calls


@pytest.mark.parametrize("data", BATCHES)
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_attention_is_not_computed_again_where_its_output_waits(family, lora, data, host, attends) -> None:
    expected = plain(family, lora, data)
    _, ours = models(family, lora)
    store, calls = spread(ours, 7, 5, 4), len(attends)
    assert_equal(manual(ours, BATCHES[data]()), expected)
    assert len(attends) - calls == 2 * LAYERS - 4
    tokens, text = 4 * BATCHES[data]()["input_ids"].numel(), ours.config
    width = text.num_attention_heads * text.head_dim
    assert host.booked == pytest.approx(
        store.host_bytes(Sizes(tokens * text.hidden_size, 0, tokens * width)), rel=0.01, abs=LAYERS
    )
    assert host.arena.free == host.booked


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_attention_of_groups_of_heads_is_not_computed_again(family, monkeypatch, attends) -> None:
    monkeypatch.setattr(Recompute, "tile", lambda self, hidden: 7)
    monkeypatch.setattr(Recompute, "group", lambda self, hidden: 1)
    _, ours = models(family)
    one_level(ours)
    expected, calls = manual(ours, batch()), len(attends)
    spread(ours, 7, 5, 6)
    assert_equal(manual(ours, batch()), expected)
    assert (calls, len(attends) - calls) == (2 * 2 * LAYERS, 2 * (2 * LAYERS - 6))


def test_it_waits_by_the_plan(host, monkeypatch, attends) -> None:
    """On the host to the byte, and only of layers that keep nothing else."""
    monkeypatch.setattr(recompute, "WORK_OF_A_BYTE", 0)
    expected = plain("llama", True, "rows")
    _, ours = models()
    one_level(ours)
    chosen, calls = layers_that_choose(ours), len(attends)
    of_layer = sizes(chosen, 3, 11)
    room = 5 * of_layer.input + 3 * of_layer.attended + 1
    Lean(chosen, lambda *_: 2**40, lambda: room, last=lambda rows, length: 4).attach()
    assert_equal(manual(ours, batch(3, 11)), expected)
    assert [one.attended for one in chosen] == [True] * 3 + [False] * 4
    assert len(attends) - calls == 2 * LAYERS - 3 - 1
    assert host.booked == pytest.approx(2 * (room - 1), rel=0.01)


@pytest.mark.slow
def test_sixteen_thousand_tokens(host, monkeypatch) -> None:
    """Tiles, groups of heads, inputs and outputs in host memory by late copies: all in one, against everything kept."""
    _, ours = pair(num_hidden_layers=2, max_position_embeddings=2**14, num_attention_heads=2)
    data = batch(1, 2**14)
    one_level(ours, 4)
    expected = manual(ours, data)
    monkeypatch.setattr(Recompute, "tile", lambda self, hidden: 1000)
    monkeypatch.setattr(Recompute, "group", lambda self, hidden: 1)
    delay(host, monkeypatch)
    for starts, attended in (((0, 1), 1), ((0,), 0)):
        one_level(ours)
        for index, layer in enumerate(layers(ours)):
            chosen = layer.ftcore_recompute
            chosen.inside, chosen.away, chosen.attended = index not in starts, index == 0, index < attended
        found = manual(ours, data)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


# Where a segment ends ----------------------------------------------------------------------------------------------


def hidden_loss(model: Any, index: int) -> Found:
    """The loss of a hidden state in the middle: later layers have no backward."""
    model.zero_grad()
    with own_forwards(model) as calls:
        states = base(model).model(batch()["input_ids"], output_hidden_states=True).hidden_states
    assert not calls
    loss = states[index].square().mean()
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("index", [2, 4, 5])
def test_a_layer_whose_follower_has_no_backward(index) -> None:
    _, ours = models()
    one_level(ours)
    expected = hidden_loss(ours, index)
    spread(ours, 2, 2)
    found = hidden_loss(ours, index)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() != set()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_something_between_two_layers_ends_the_segment(again) -> None:
    """The output that a hook changes is not what the layer would make again."""
    _, ours = models()
    handle = layers(ours)[2].register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        one_level(ours)
        expected = manual(ours, batch())
        spread(ours, 1, 1)
        assert_equal(manual(ours, batch()), expected)
    finally:
        handle.remove()
    assert len(again) == LAYERS - 2, "the layer behind the hook keeps its input"


@pytest.mark.parametrize("before", [False, True])
def test_a_layer_with_a_hook_ends_the_segment(before, again) -> None:
    """It may write to what it sees by `data`, which torch does not notice."""
    _, ours = models()

    def hook(module: Any, args: Any, out: Any = None) -> None:
        (args[0] if before else out).data.add_(0.5)

    place = layers(ours)[3 if before else 2]
    handle = place.register_forward_pre_hook(hook) if before else place.register_forward_hook(hook)
    try:
        one_level(ours)
        expected = manual(ours, batch())
        again.clear()
        spread(ours, 1, 1)
        assert_equal(manual(ours, batch()), expected)
    finally:
        handle.remove()
    assert len(again) == LAYERS - 2


def test_nobody_writes_over_an_output_unnoticed() -> None:
    _, ours = models()
    spread(ours, 1, 1)
    handle = layers(ours)[2].register_forward_hook(lambda module, args, out: (out.detach().mul_(1.5), None)[1])
    try:
        with pytest.raises(RuntimeError, match="modified inplace"):
            ours(**batch())
    finally:
        handle.remove()


def test_a_layer_of_transformers_ends_the_segment(again) -> None:
    _, ours = pair(num_hidden_layers=LAYERS)
    one_level(ours)
    del layers(ours)[3].forward
    with own_forwards(ours) as calls:
        expected = maths.loss_and_gradients(ours, batch())
        spread(ours, 1, 1)
        assert_equal(maths.loss_and_gradients(ours, batch()), expected)
    assert len(calls) == 2
    assert len(again) == 2 + 2


def test_two_layers_that_read_one_output(again) -> None:
    """A tree: only one of them follows, the other one keeps its input."""
    _, ours = models()
    first, one, other = layers(ours)[:3]
    entry = torch.randn(2, 7, ours.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tables = base(ours).model.rotary_emb(entry, torch.arange(7, device=DEVICE)[None])

    def gradients() -> list[torch.Tensor]:
        ours.zero_grad()
        out = first(entry, position_embeddings=tables)
        (one(out, position_embeddings=tables) * other(out, position_embeddings=tables)).sum().backward()
        return [p.grad.clone() for layer in (first, one, other) for p in layer.parameters() if p.grad is not None]

    one_level(ours)
    expected = gradients()
    spread(ours, 1, 1)
    assert all(map(torch.equal, gradients(), expected))
    assert len(again) == 1


def test_a_backward_runs_once() -> None:
    _, ours = models()
    spread(ours, 3, 2)
    loss = ours(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


@pytest.mark.parametrize(("kept", "away"), [(3, 0), (6, 6)])
def test_a_kept_input_that_was_written_over(kept, away) -> None:
    _, ours = models()
    store, found = spread(ours, kept, away), []
    handle = layers(ours)[store.starts[1]].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        loss = ours(**batch()).loss
    finally:
        handle.remove()
    with torch.no_grad():
        found[0].add_(1)
    if store.away > 1:  # it is in host memory by now
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="written over"):
            loss.backward()


# Memory ------------------------------------------------------------------------------------------------------------


def test_host_memory_does_not_grow_with_steps(host) -> None:
    """Rows of mixed length: booked is what the largest batch needs, within a hundredth."""
    _, ours = models()
    store = spread(ours, 6, 6)
    lengths = [5 + (step * 7) % 13 for step in range(14)]
    booked = []
    for length in lengths:
        ours(**batch(1, length)).loss.backward()
        booked.append(host.booked)
    size = 4 * max(lengths) * ours.config.hidden_size
    first = lengths.index(max(lengths))
    assert store.host_bytes(Sizes(size)) <= booked[-1] <= 1.01 * store.host_bytes(Sizes(size))
    assert set(booked[first:]) == {booked[-1]}
    assert host.arena.free == host.booked


@pytest.fixture
def most(monkeypatch) -> list[int]:
    """The largest number of inputs on the device while a backward or a forward in it begins."""
    places: list[Any] = []
    found = [0]

    def watch(cls: Any) -> None:
        own = cls.__init__

        def watched(self: Any, *args: Any) -> None:
            own(self, *args)
            places.append(weakref.ref(self))

        monkeypatch.setattr(cls, "__init__", watched)

    def counted(name: str, taken: int) -> Callable[..., Any]:
        own = getattr(steps, name)

        def count(*args: Any, **more: Any) -> Any:
            there = [p for ref in places if (p := ref()) is not None]
            tensors = [getattr(p, field, None) for p in there for field in ("_tensor", "_source", "_arriving", "_x")]
            found[0] = max(found[0], taken + sum(isinstance(tensor, torch.Tensor) for tensor in tensors))
            return own(*args, **more)

        return count

    for cls in (segments.Here, segments.Member, Away):
        watch(cls)
    monkeypatch.setattr(function, "steps", SimpleNamespace(forward=steps.forward, backward=counted("backward", 1)))
    monkeypatch.setattr(segments, "steps", SimpleNamespace(forward=counted("forward", 0)))
    return found


@pytest.mark.parametrize("free_inputs", [2, 3, 5, 40])
@pytest.mark.parametrize("host_inputs", [0, 1, 3, 40])
def test_what_was_planned_is_what_is_booked(host_inputs, free_inputs, host, most) -> None:
    """By the chooser that `memory=` attaches: on the host to the byte, on the device no more inputs than counted."""
    expected = plain("llama", True, "rows")
    _, ours = models()
    one_level(ours)
    most[0] = 0
    chosen = layers_that_choose(ours)
    size, beside, *_ = sizes(chosen, 3, 11)
    free, there = free_inputs * size + LAYERS * beside, host_inputs * size
    store, said = stored(chosen, 3, 11, free, there), []
    Lean(chosen, lambda *_: free, lambda: there, lambda rows, length, store: said.append(store)).attach()
    assert_equal(manual(ours, batch(3, 11)), expected)
    assert host.booked == store.host_bytes(Sizes(2 * size))
    assert most[0] <= store.held
    assert said == ([store] if store.made_again else [])
    if free_inputs == 40:
        assert (len(store.starts), store.away) == (LAYERS, min(host_inputs, LAYERS - STAY))


# On a GPU ----------------------------------------------------------------------------------------------------------

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")]
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}


def in_16_bits(family: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model under LoRA on Triton's steps, with its MLP in tiles."""
    more = {"layer_types": None} if family == "gemma3" else {}
    plain = build(family, num_hidden_layers=LAYERS, max_position_embeddings=2**15, **WIDE, **more).to(torch.bfloat16)
    monkeypatch.setattr(Recompute, "tile", lambda self, hidden: tile)
    return patched(adapt(plain, family), family, "triton")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(("kept", "away", "attended"), [(6, 6, 0), (5, 5, 0), (2, 0, 0), (7, 5, 6)])
@pytest.mark.parametrize("family", [pytest.param(name, marks=ON_GPU) for name in ("llama", "qwen3", "gemma3")])
def test_16_bits_on_a_gpu(family, kept, away, attended, late, host, monkeypatch) -> None:
    """To the last bit; FlashAttention's backward has an order of its own only where nothing else may be without one."""
    torch.use_deterministic_algorithms(True)
    ours = in_16_bits(family, 768, monkeypatch)
    one_level(ours)
    expected = manual(ours, batch(1, 2000))
    store = spread(ours, kept, away, attended)
    if late:
        delay(host, monkeypatch)
    for _ in range(2):
        assert_equal(manual(ours, batch(1, 2000)), expected)
    size = 2 * 2000 * WIDE["hidden_size"]  # and all heads are as wide
    assert host.booked == pytest.approx(store.host_bytes(Sizes(size, 0, size)), rel=0.01)


@pytest.mark.parametrize(
    ("kept", "away", "attended"),
    [pytest.param(6, 6, 0, marks=ON_GPU), pytest.param(3, 0, 0, marks=ON_GPU), pytest.param(7, 5, 6, marks=ON_GPU)],
)
def test_memory_of_a_gpu(kept, away, attended, monkeypatch) -> None:
    """The peak falls by the inputs that are not there, and what was kept beside those: on an H200 by 4.3 for 3.

    It rises by an output of attention on its way, and by what stays beside those that left.
    """
    ours, tokens = in_16_bits("llama", 2048, monkeypatch), 2**14

    def peak() -> int:
        for _ in range(2):
            ours.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            base(ours).model(batch(1, tokens)["input_ids"]).last_hidden_state.sum().backward()
        return torch.cuda.max_memory_allocated()

    one_level(ours)
    before = peak()
    store, chosen = spread(ours, kept, away, attended), layers_that_choose(ours)
    size, statistics = chosen[0].input_bytes(1, tokens), 4 * tokens * WIDE["num_attention_heads"]
    more = store.attended_bytes(Sizes(size, 0, size, statistics))  # all heads are as wide as an input
    assert 0.75 * (LAYERS - store.held) * size - more <= before - peak() <= (LAYERS - store.held + 2) * size
