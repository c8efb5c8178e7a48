"""What is recomputed: levels under a budget, when a plan is made, and what `memory=` tells which layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ftcore
from ftcore import Role, memory
from ftcore.config import Graphs, Memory, Optimizer
from ftcore.planner import POOL, Lean, Planner, assign
from ftcore.specs import Level, Passes, Plan, TrainerSpec
from ftcore.store import Sizes, Store, stored
from ftcore.testing import maths, runs

# assign ------------------------------------------------------------------------------------------------------------


def kept(levels: Sequence[Sequence[Level]], chosen: Sequence[int]) -> int:
    return sum(of_layer[index].kept for of_layer, index in zip(levels, chosen, strict=True))


def again(levels: Sequence[Sequence[Level]], chosen: Sequence[int]) -> float:
    return sum(of_layer[index].again for of_layer, index in zip(levels, chosen, strict=True))


def from_steps(start: int, steps: Sequence[tuple[int, int]]) -> list[Level]:
    """Levels from (more bytes, work saved) a step; everything kept means nothing computed again."""
    work = sum(saved for _, saved in steps)
    found = [Level(start, work)]
    for more, saved in steps:
        found.append(Level(found[-1].kept + more, found[-1].again - saved))
    return found


STEPS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=0, max_size=4)
LAYER = st.builds(from_steps, st.integers(0, 30), STEPS)
LAYERS = st.lists(LAYER, min_size=1, max_size=6)


def convex(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each step is worth less for its bytes than the one before."""
    return sorted(((more + 1, saved) for more, saved in steps), key=lambda step: step[1] / step[0], reverse=True)


CONVEX = st.lists(st.builds(lambda start, steps: from_steps(start, convex(steps)), st.integers(0, 30), STEPS),
                  min_size=1, max_size=6)  # fmt: skip


@given(LAYERS, st.integers(-50, 1000))
def test_never_over_the_budget_unless_the_least_is(levels, budget) -> None:
    chosen = assign(levels, budget)
    assert len(chosen) == len(levels)
    assert all(0 <= index < len(of_layer) for index, of_layer in zip(chosen, levels, strict=True))
    least = sum(of_layer[0].kept for of_layer in levels)
    if least > budget:
        assert kept(levels, chosen) == least
    else:
        assert kept(levels, chosen) <= budget


@given(LAYERS)
def test_everything_is_kept_where_it_fits(levels) -> None:
    most = [len(of_layer) - 1 for of_layer in levels]
    chosen = assign(levels, kept(levels, most))
    assert again(levels, chosen) == 0
    assert kept(levels, chosen) <= kept(levels, most)


@given(LAYERS, st.integers(0, 500))
def test_no_further_level_would_fit(levels, budget) -> None:
    """What is left over does not pay for any level of any layer that saves work."""
    chosen = assign(levels, budget)
    left = budget - kept(levels, chosen)
    for of_layer, index in zip(levels, chosen, strict=True):
        for further in of_layer[index + 1 :]:
            assert further.kept - of_layer[index].kept > left or further.again == of_layer[index].again


@given(CONVEX, st.integers(0, 500), st.integers(0, 100))
def test_more_memory_never_means_more_work(levels, budget, more) -> None:
    """Where each level is worth less for its bytes than the one before."""
    assert again(levels, assign(levels, budget + more)) <= again(levels, assign(levels, budget))


@given(LAYER, st.integers(1, 6), st.integers(0, 500))
def test_among_equal_layers_the_last_keep_most(layer, number, budget) -> None:
    chosen = assign([layer] * number, budget)
    assert [layer[index].again for index in chosen] == sorted((layer[index].again for index in chosen), reverse=True)


@settings(max_examples=30)
@given(st.lists(LAYER, min_size=1, max_size=3), st.integers(0, 300))
def test_not_far_from_the_best_choice(levels, budget) -> None:
    """Greedy over the hull: at most the work of one step of one layer more than the best of all choices."""
    import itertools

    choices = itertools.product(*(range(len(of_layer)) for of_layer in levels))
    best = min((again(levels, c) for c in choices if kept(levels, c) <= budget), default=None)
    if best is not None:
        assert again(levels, assign(levels, budget)) <= best + max(of_layer[0].again for of_layer in levels)


TWO = [from_steps(10, [(10, 100), (20, 60), (10, 10)])] * 2


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (0, [0, 0]),  # not even the least fits
        (20, [0, 0]),
        (29, [0, 0]),
        (30, [0, 1]),
        (40, [1, 1]),
        (59, [1, 1]),
        (60, [1, 2]),
        (70, [1, 3]),  # 30 more for a second layer's next step is not there, 10 for this one's are
        (80, [2, 2]),
        (90, [2, 3]),
        (100, [3, 3]),
        (10_000, [3, 3]),
    ],
)
def test_two_layers(budget, chosen) -> None:
    assert assign(TWO, budget) == chosen


def test_a_step_that_saves_more_goes_first_whatever_its_layer() -> None:
    poor, rich = from_steps(0, [(10, 10)]), from_steps(0, [(10, 11)])
    assert assign([rich, poor], 10) == [1, 0]
    assert assign([poor, rich], 10) == [0, 1]


def test_a_level_off_the_hull_is_passed_over_and_taken_where_nothing_else_fits() -> None:
    layer = from_steps(0, [(10, 1), (10, 99)])  # both steps together are the best one
    assert assign([layer], 20) == [2]
    assert assign([layer], 19) == [1]
    assert assign([layer], 9) == [0]


def test_one_level_and_no_layer() -> None:
    assert assign([[Level(5, 0.0)]], 100) == [0]
    assert assign([], 100) == []


# When a plan is made -----------------------------------------------------------------------------------------------


@dataclass
class Fake:
    """A layer that keeps 10 or 20 bytes a token."""

    choose: Any = None
    may_record: bool = True
    away: bool = False
    inside: bool = False
    tiled: bool = False
    attended: bool = False
    attended_size: int = 0
    """Bytes a token of attention's output, and one of what stays beside it."""
    followed: Any = "nobody"
    recorded: float = 0
    width: int = 2

    def levels(self, rows: int, length: int) -> list[Level]:
        tokens = rows * length
        return [Level(10 * tokens, 5.0 * tokens), Level(20 * tokens, 0.0)]

    def input_bytes(self, rows: int, length: int) -> int:
        return 4 * rows * length

    def moved(self, rows: int, length: int) -> int:
        return 4 * rows * length if rows < 100 else 0

    def attended_bytes(self, rows: int, length: int) -> tuple[int, int]:
        return self.attended_size * rows * length, min(self.attended_size, 1) * rows * length

    def workspace(self, rows: int, length: int, tiled: bool = False) -> int:
        return (3 if tiled else 7) * rows * length

    def follow(self, before: Any) -> None:
        self.followed = before


Question = tuple[int, int, int, bool, bool]


def planned(budget: Callable[[Question], int]) -> tuple[Callable[[int, int], list[int]], list[Question], list[Fake]]:
    """A function that plays a forward pass, and the questions after memory that it leads to."""
    asked: list[Question] = []

    def ask(*question: Any) -> int:
        asked.append(question)
        return budget(question)

    fakes = [Fake() for _ in range(3)]
    Planner(fakes, ask).attach()
    return lambda rows, length: [fake.choose(rows, length) for fake in fakes], asked, fakes


@pytest.mark.parametrize(
    ("free", "host", "rows", "levels", "away"),
    [
        (200, 10**6, 1, [1] * 10, 0),  # everything fits as it is
        (199, 10**6, 1, [1] * 10, 8),  # eight inputs of 4 bytes more
        (150, 10**6, 1, [0] * 2 + [1] * 8, 8),  # 32 bytes more, three layers of them
        (150, 31, 1, [0] * 5 + [1] * 5, 0),  # the host has no room
        (150 * 100, 10**6, 100, [0] * 5 + [1] * 5, 0),  # the copies would take longer than the layers
        (99 * 100, 10**6, 100, [0] * 10, 8),  # but without them it does not fit
    ],
)
def test_inputs_wait_in_host_memory_where_not_everything_fits(free, host, rows, levels, away) -> None:
    fakes = [Fake(away=not away) for _ in range(10)]
    Planner(fakes, lambda *question: -1 if question[3] else free, lambda: host).attach()
    assert [fake.choose(rows, 1) for fake in fakes] == levels
    assert [fake.away for fake in fakes] == [True] * away + [False] * (10 - away), "the last ones need not leave"


def states(fakes: list[Fake]) -> str:
    return "".join("i" if fake.inside else "a" if fake.away else "h" for fake in fakes)


@pytest.mark.parametrize("kind", [Planner, Lean])
@pytest.mark.parametrize(
    ("inputs", "host", "expected"),
    [
        (2, 40, "aaaaaaaahh"),  # 8 in host memory, 2 here
        (3, 12, "aiaiaihihh"),  # 3 there, 3 here: of a segment two at most, with one on its way
        (5, 16, "aiaaahhhhh"),  # as many here as there may be
        (5, 0, "hiihihihih"),  # none there: the later a segment, the more inputs of others are still here
        (1, 0, "hiiiihiiii"),  # nothing fits: what takes least
    ],
)
def test_fewest_inputs_are_made_again(kind, inputs, host, expected) -> None:
    """Inputs of 4 bytes; each layer that is the last of its segment keeps 6 besides."""
    fakes, said = [Fake() for _ in range(10)], []
    kept = 10 - expected.count("i")
    budget = 4 * inputs + 6 * kept
    kind(
        fakes, lambda *question: -1 if question[3] else budget, lambda: host, lambda *store: said.append(store)
    ).attach()
    assert [fake.choose(1, 1) for fake in fakes] == [0] * 10
    assert states(fakes) == expected
    assert all(fake.tiled and not fake.may_record for fake in fakes)
    assert len(said) == ("i" in expected)


@pytest.mark.parametrize(
    ("inputs", "host", "expected"),
    [
        (10, 40, ""),  # the inputs take 32 of these, and an output 9
        (10, 50, "00"),
        (10, 10**6, "0" * 9),  # the last layer's backward comes next
        (0, 10**6, "0000"),  # 11 bytes more on the GPU: an output on its way, and two of each layer's
        (-1, 12, ""),  # where inputs are made again, attention is as well
    ],
)
def test_what_attention_gave_waits_where_the_host_has_room(inputs, host, expected) -> None:
    """Whatever the last layer keeps besides."""
    fakes = [Fake(attended_size=9) for _ in range(10)]
    budget = 8 + 6 * 10 + 13 if inputs == 0 else 4 * inputs + 6 * 10 + 60
    if inputs < 0:
        budget = 30
    Lean(fakes, lambda *_: budget, lambda: host, last=lambda rows, length: 1).attach()
    levels = [fake.choose(1, 1) for fake in fakes]
    assert "".join(str(levels[index]) for index, fake in enumerate(fakes) if fake.attended) == expected


@pytest.mark.parametrize(
    ("free", "host", "levels", "attended"),
    [
        (150, 10**6, "0001111111", 3),  # 182 bytes, and 11 of them for what leaves, so that one layer less keeps all
        (150, 32 + 2, "0001111111", 2),
        (150, 32 + 1, "0011111111", 0),  # one layer that attends again less, and one more
        (150, 31, "0000011111", 0),  # not even the inputs leave
        (75, 10**6, "0000000000", 0),  # no room for what stays
    ],
)
def test_attention_is_not_computed_again_where_that_saves_most(free, host, levels, attended) -> None:
    """What attention gave takes a byte of the host and one of the GPU, and one more of the GPU on its way."""
    fakes = [Fake(attended_size=1) for _ in range(10)]
    Planner(fakes, lambda *question: -1 if question[3] else free, lambda: host).attach()
    assert "".join(str(fake.choose(1, 1)) for fake in fakes) == levels
    assert [fake.attended for fake in fakes] == [True] * attended + [False] * (10 - attended)


def test_segments_belong_to_the_shape_that_they_were_planned_for() -> None:
    """And each is spoken of once."""
    fakes, said = [Fake() for _ in range(10)], []
    Lean(fakes, lambda *_: 100, lambda: 0, lambda *store: said.append(store)).attach()
    for _ in range(4):
        for length, expected in ((1, "h" * 10), (2, "hiihihihih"), (1, "h" * 10)):
            for fake in fakes:
                fake.choose(1, length)
            assert states(fakes) == expected
    assert len(said) == 1


@given(st.integers(1, 40), st.data())
def test_a_store_holds_no_more_than_it_says(layers, data) -> None:
    """Played: the backward of every layer from the last one on."""
    kept, room = data.draw(st.integers(1, layers)), data.draw(st.integers(0, 50))
    store = Store.of(layers, kept, room)
    assert len(store.starts) == len(set(store.starts)) == kept
    assert store.starts[0] == 0
    assert store.made_again == layers - kept
    assert store.away <= room
    most = here = kept - store.away
    ends = (*store.starts[1:], layers)
    for place in range(kept - 1, -1, -1):
        length = ends[place] - store.starts[place]
        on_its_way = 1 if 0 < place <= store.away else 0
        most = max(most, here * (place >= store.away) + (place < store.away) + length - 1 + on_its_way)
        here -= 1
    assert most <= store.held


@given(st.integers(1, 40), st.integers(0, 400), st.integers(0, 400), st.sampled_from([0, 3]))
def test_a_store_fits_if_any_does(layers, gpu, host, attended) -> None:
    """And makes fewest inputs again of all that do, and attends again in as few layers as there is room for."""
    fakes = [Fake(attended_size=attended) for _ in range(layers)]
    store = stored(fakes, 1, 1, gpu, host)
    sizes = Sizes(4, 6, attended, min(attended, 1))
    assert store.host_bytes(sizes) <= host
    choices = [Store.of(layers, kept, host // 4) for kept in range(1, layers + 1)]
    fitting = [choice for choice in choices if choice.gpu_bytes(sizes) <= gpu]
    if fitting:
        assert store.gpu_bytes(sizes) <= gpu
        assert store.made_again == min(choice.made_again for choice in fitting)
    else:
        assert store.gpu_bytes(sizes) == min(choice.gpu_bytes(sizes) for choice in choices)
    more = replace(store, attended=store.attended + 1)
    if not store.made_again and more.attended < layers:
        assert not sizes.attended or more.gpu_bytes(sizes) > gpu or more.host_bytes(sizes) > host, "one more would fit"
    else:
        assert store.attended == 0 or more.attended == layers


def test_the_first_plan_stands_for_two_batches_and_the_second_for_good() -> None:
    forward, asked, _ = planned(lambda question: {0: 40, 2: 50}[question[2]])
    assert [forward(1, 1) for _ in range(6)] == [[0, 0, 1]] * 2 + [[0, 1, 1]] * 4
    assert asked == [
        (1, 1, made, recorded, tiled)
        for made in (0, 2)
        for recorded, tiled in ((True, False), (False, False), (False, True))
    ]


def test_a_second_plan_may_keep_less() -> None:
    forward, _, _ = planned(lambda question: {0: 100, 2: 40}[question[2]])
    assert [forward(1, 1) for _ in range(4)] == [[1, 1, 1]] * 2 + [[0, 0, 1]] * 2


def test_launches_are_recorded_where_everything_is_kept_besides() -> None:
    """Recording takes memory: what it leaves has to hold everything, or there is none."""
    forward, asked, fakes = planned(lambda question: 60)
    assert forward(1, 1) == [1, 1, 1]
    assert asked == [(1, 1, 0, True, False)]
    assert all(fake.may_record for fake in fakes)
    forward, asked, fakes = planned(lambda question: 59 if question[3] else 60)
    assert forward(1, 1) == [1, 1, 1]
    assert asked == [(1, 1, 0, True, False), (1, 1, 0, False, False)]
    assert not any(fake.may_record for fake in fakes)


def test_layers_work_in_tiles_before_anything_is_computed_again() -> None:
    """What tiles free goes into keeping; where everything fits as it is, there are none."""
    for free, levels, tiled in ((60, [1, 1, 1], False), (50, [1, 1, 1], True), (49, [0, 1, 1], True)):
        forward, asked, fakes = planned(lambda question, free=free: free + (10 if question[4] else 0))
        assert forward(1, 1) == levels
        assert {fake.tiled for fake in fakes} == {tiled}
        assert [question[4] for question in asked] == ([False] if not tiled else [False, False, True])


def test_tiles_belong_to_the_shape_that_they_were_planned_for() -> None:
    forward, _, fakes = planned(lambda question: 100)
    for _ in range(4):
        forward(1, 1)
        assert not any(fake.tiled for fake in fakes)
        forward(2, 2)
        assert all(fake.tiled for fake in fakes)


def test_every_shape_has_a_plan_of_its_own() -> None:
    forward, asked, _ = planned(lambda question: 100)
    shapes = {(1, 1): [1, 1, 1], (2, 2): [0, 0, 0], (1, 2): [0, 1, 1]}
    for _ in range(4):
        for shape, chosen in shapes.items():
            assert forward(*shape) == chosen
    assert [question[:3] for question in asked if question[4]] == [
        (2, 2, 0),
        (1, 2, 0),
        (2, 2, 2),
        (1, 2, 2),
    ]


def test_recording_belongs_to_the_shape_that_it_was_planned_for() -> None:
    forward, _, fakes = planned(lambda question: 100)
    for _ in range(4):
        forward(1, 1)
        assert all(fake.may_record for fake in fakes)
        forward(2, 2)
        assert not any(fake.may_record for fake in fakes)


# What `memory=` does -----------------------------------------------------------------------------------------------

TINY = ["+model=llama", "model.tiny=true", "model.dtype=float32"]
WORDS = [*TINY, "kernels=[reference]"]
ROLE = Role("decoder_layer", "LlamaDecoderLayer")


def fresh(kernel_set: str = "reference") -> tuple[Plan, Any]:
    """A plan and its model, with nothing said about memory yet."""
    if torch.cuda.is_available():
        pytest.skip("GPUs are faked here")
    loaded = runs.loaded([*TINY, "memory=off", f"kernels=[{kernel_set}]"])
    return loaded.plan, loaded.model


def with_memory(plan: Plan, mode: Memory, **more: Any) -> Plan:
    return replace(plan, run=replace(plan.run, memory=mode, graphs=Graphs.off, **more))


def layers_of(model: Any) -> list[Any]:
    return list(model.get_base_model().model.layers)


def checkpointed(model: Any) -> list[bool]:
    return [layer.gradient_checkpointing for layer in layers_of(model)]


def test_off_tells_nobody() -> None:
    plan, model = fresh()
    assert not memory.apply(with_memory(plan, Memory.off), model)
    assert [layer.ftcore_recompute.choose for layer in layers_of(model)] == [None, None]
    assert checkpointed(model) == [False, False]


def test_auto_keeps_everything_on_a_cpu() -> None:
    plan, model = fresh()
    assert not memory.apply(with_memory(plan, Memory.auto), model)
    assert [layer.ftcore_recompute.choose for layer in layers_of(model)] == [None, None]
    assert checkpointed(model) == [False, False]


def test_least_recomputes_within_the_layers() -> None:
    """The last layer keeps what the head's memory pays for; the others keep their inputs, at any size of batch."""
    plan, model = fresh()
    assert memory.apply(with_memory(plan, Memory.least), model)
    assert checkpointed(model) == [False, False], "a layer would be recomputed twice"
    first, last = (layer.ftcore_recompute for layer in layers_of(model))
    assert not (first.may_record or last.may_record), "recording takes memory"
    for rows, length in ((1, 1), (2, 37), (8, 4096), (64, 32768)):
        assert first.tiled
        assert last.tiled
        assert first.choose(rows, length) == 0
        levels = last.levels(rows, length)
        spare = max(last.workspace(rows, length, True) - memory.head_bytes(model, rows, length), 0)
        assert levels[last.choose(rows, length)].kept - levels[0].kept <= spare


def test_least_makes_inputs_again_where_they_do_not_fit_and_says_so(monkeypatch, capsys) -> None:
    plan, model = fresh()
    runs.shake(model, trainable_only=True)
    batch = runs.batch_for(model)
    loss, gradients = maths.loss_and_gradients(model, batch)
    rows, length = batch["input_ids"].shape
    for free, inside in ((2**40, False), (0, True)):
        assert memory.apply(replace(with_memory(plan, Memory.least), device=Gpu(monkeypatch, free)), model)
        our_loss, ours = maths.loss_and_gradients(model, batch)
        assert [layer.ftcore_recompute.inside for layer in layers_of(model)] == [False, inside]
        assert torch.equal(our_loss, loss)
        assert all(torch.equal(ours[name], gradients[name]) for name in gradients)
        said = f"memory: of {rows} x {length} tokens the inputs of 1 of 2 layers are kept (on the GPU); those of the "
        assert capsys.readouterr().out.startswith(said) == inside


def test_least_checkpoints_layers_that_no_kernel_took_over() -> None:
    plan, model = fresh("")
    assert memory.apply(with_memory(plan, Memory.least), model)
    assert checkpointed(model) == [True, True]


def test_least_checkpoints_only_the_layers_that_no_kernel_took_over() -> None:
    from ftcore_kernels.layers.decoder import install_reference

    plan, model = fresh("")
    _, untouched = fresh("")
    for other in (model, untouched):
        runs.shake(other, trainable_only=True)
    install_reference(layers_of(model)[1], ROLE)
    assert memory.apply(with_memory(plan, Memory.least), model)
    assert checkpointed(model) == [True, False]
    batch = runs.batch_for(model)
    (loss, gradients), (our_loss, ours) = (maths.loss_and_gradients(x, batch) for x in (untouched, model))
    assert maths.apart(our_loss, loss) <= 1e-5
    assert gradients.keys() == ours.keys()
    assert max(maths.apart(ours[name], gradients[name]) for name in gradients) <= 1e-5


class Gpu:
    """A GPU that is not there: so much memory is free, so much is allocated."""

    kind, capability, runs_triton, dtype = "cuda", (9, 0), False, "float32"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, allocated: int = 0, cached: int = 0) -> None:
        self.memory = free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 10 * free))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: allocated + cached)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda *_: {}, raising=False)


def levels_on(model: Any, rows: int, length: int) -> list[int]:
    return [layer.ftcore_recompute.choose(rows, length) for layer in layers_of(model)]


@pytest.mark.parametrize("limited", [False, True], ids=["free memory", "memory_limit"])
def test_auto_keeps_what_fits_on_a_gpu(monkeypatch, limited) -> None:
    rows, length = 4, 512
    seen = []
    for share in (0.0, 0.5, 1.0):
        plan, model = fresh()
        recomputers = [layer.ftcore_recompute for layer in layers_of(model)]
        levels = recomputers[0].levels(rows, length)
        wanted = levels[0].kept * 2 + share * 2 * (levels[-1].kept - levels[0].kept)
        # What a budget of 0 takes; then the same GPU with what is wanted on top.
        gpu = Gpu(monkeypatch, free=2**40)
        needed = 2**40 * (1 - memory.GIVEN_AWAY) - memory.budget(model, recomputers, rows, length, 8, False)
        spare = memory.ROUNDED_UP if limited else 0
        free = int((wanted + needed) / (1 if limited else 1 - memory.GIVEN_AWAY)) + spare + 2
        gpu = Gpu(monkeypatch, free=2**40 if limited else free)
        limit = {"memory_limit": free / 2**30} if limited else {}
        plan = replace(with_memory(plan, Memory.auto, **limit), device=gpu)
        assert not memory.apply(plan, model), "nothing else recomputes"
        assert checkpointed(model) == [False, False]
        seen.append(levels_on(model, rows, length))
    assert seen[0] == [0, 0]
    assert seen[0] < seen[1] < seen[2]
    assert seen[1] == sorted(seen[1]), "the last layer keeps most"
    assert seen[2] == [4, 4]


@pytest.mark.parametrize(("dtype", "width"), [("auto", 4), ("float32", 4), ("bfloat16", 2)])
def test_layers_know_how_wide_activations_are(dtype, width) -> None:
    """A CPU computes in 32 bits unless it is told otherwise."""
    plan, model = fresh()
    assert plan.run.model is not None
    plan = replace(plan, run=replace(plan.run, model=replace(plan.run.model, dtype=dtype)))
    memory.apply(plan, model)
    counted = [layer.ftcore_recompute for layer in layers_of(model)]
    assert [layer.width for layer in counted] == [width, width]
    assert counted[0].input_bytes(2, 3) == width * 6 * model.config.hidden_size
    wide, narrow = (memory.head_bytes(model, 2, 3, bytes_) for bytes_ in (4, 2))
    assert wide - narrow == 2 * 6 * model.config.vocab_size + 6 * 6 * model.config.hidden_size


def test_a_model_knows_how_many_sequences_a_row_is() -> None:
    plan, model = fresh()
    memory.apply(plan, model)
    assert model.ftcore_memory.sequences == 1
    pairs = TrainerSpec(accepts=frozenset({"pair"}), passes=Passes(sequences=2))
    memory.apply(replace(plan, trainer=pairs), model)
    assert model.ftcore_memory.sequences == 2


def test_recorded_launches_take_memory_of_their_own(monkeypatch) -> None:
    """Of what their memory has room for, a part is lost to blocks of other sizes."""
    Gpu(monkeypatch, free=2**30)
    _, model = fresh()
    fakes = [Fake(), Fake()]
    without = memory.budget(model, fakes, 100, 100, 0, True)
    fakes[1].recorded = 100 * 100
    assert memory.budget(model, fakes, 100, 100, 0, True) == without, "rows are too many"
    fakes[1].recorded = 100 * 100 + 1
    assert memory.budget(model, fakes, 100, 100, 0, True) == int(without / (1 + POOL))
    assert memory.budget(model, fakes, 100, 100, 0, False) >= without


def test_auto_changes_no_number(monkeypatch) -> None:
    plan, model = fresh()
    runs.shake(model, trainable_only=True)
    batch = runs.batch_for(model)
    loss, gradients = maths.loss_and_gradients(model, batch)
    plan = replace(with_memory(plan, Memory.auto), device=Gpu(monkeypatch, free=0))
    memory.apply(plan, model)
    assert levels_on(model, *batch["input_ids"].shape) == [0, 0]
    for _ in range(3):
        our_loss, ours = maths.loss_and_gradients(model, batch)
        assert torch.equal(our_loss, loss)
        assert all(torch.equal(ours[name], gradients[name]) for name in gradients)


def test_budget_counts_what_is_still_to_come(monkeypatch) -> None:
    gib = 2**30
    _, model = fresh()
    fakes = [Fake(), Fake()]

    def left(state: int = 0, recorded: bool = False, limit: float | None = None) -> int:
        return memory.budget(model, fakes, 100, 100, state, recorded, limit)

    Gpu(monkeypatch, free=gib)
    base = left()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert base < (1 - memory.GIVEN_AWAY) * gib
    assert base - left(state=8) == pytest.approx(8 * trained, abs=2)
    needs = sorted((fakes[0].workspace(100, 100), memory.head_bytes(model, 100, 100)))
    assert base - left(recorded=True) == needs[0], "what is recorded does not share its memory with the head"
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    assert left() - base == pytest.approx(4 * trained, abs=2), "gradients that are there are counted by the allocator"
    with_grads = left()
    Gpu(monkeypatch, free=gib // 2, allocated=5 * gib, cached=gib // 2)
    assert left() == pytest.approx(with_grads, abs=2), "memory that torch holds and does not use is free"
    assert left(limit=5.25) < left(limit=5.5) < left(limit=5.75)
    assert left(limit=5.5) - left(limit=5.25) == pytest.approx(gib / 4, abs=2)
    assert left(limit=99) >= left()


def test_state_that_came_from_a_checkpoint_is_not_still_to_come(monkeypatch) -> None:
    """It was on the GPU before the first batch, so that nobody saw it come."""
    _, plan = runs.prepared([*WORDS, "+trainer=sft"])
    model = fresh()[1]
    Gpu(monkeypatch, free=2**30)
    found = []
    for read in (False, True):
        vars(model)[memory.STATE_READ] = read
        found.append(memory.room(plan, model, [Fake()])(100, 100, 0, False, False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found[1] - found[0] == pytest.approx(8 * trained, abs=2)


class OneB:
    """Llama-3.2-1B's layers under LoRA, without weights."""

    def __init__(self, kind: str = "plain") -> None:
        from ftcore_kernels.layers.decoder.recompute import Recompute

        def linear(inputs: int, outputs: int) -> torch.nn.Linear:
            made = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
            return made.requires_grad_(kind == "full")

        groups = [
            [linear(2048, width) for width in (2048, 512, 512)], [linear(2048, 2048)],
            [linear(2048, 8192) for _ in range(2)], [linear(8192, 2048)],
        ]  # fmt: skip
        self.layers = [Recompute(groups, head_dim=64, sandwich=False) for _ in range(16)]
        text = SimpleNamespace(vocab_size=128256, hidden_size=2048)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def plan(self, length: int, limit: float) -> list[int]:
        def budget(rows: int, length: int, made: int, recorded: bool, tiled: bool) -> int:
            return memory.budget(self, self.layers, rows, length, 0, recorded, limit, tiled)

        Planner(self.layers, budget).attach()
        return [layer.choose(1, length) for layer in self.layers]

    def takes(self, levels: list[int], length: int, tiled: bool) -> float:
        """GiB of activations, and of the head or a layer at work."""
        kept = sum(layer.levels(1, length)[level].kept for layer, level in zip(self.layers, levels, strict=True))
        at_work = max(self.layers[0].workspace(1, length, tiled), memory.head_bytes(self, 1, length))
        return (kept + at_work) / 2**30


def test_a_limit_admits_longer_rows_in_tiles(monkeypatch) -> None:
    """Llama-3.2-1B within 4 GiB above its weights; every layer keeps its input only."""
    Gpu(monkeypatch, free=2**40)
    model, lengths = OneB(), range(1024, 65537, 1024)
    longest = {
        tiled: max(length for length in lengths if model.takes([0] * 16, length, tiled) <= 4 - 2**-5)
        for tiled in (False, True)
    }
    assert longest == {False: 30 * 1024, True: 37 * 1024}
    levels = model.plan(longest[True], 4)
    assert all(layer.tiled for layer in model.layers)
    assert model.takes(levels, longest[True], True) <= 4


@pytest.mark.parametrize("limit", [4, 6, 8, 10, 12, 20])
def test_tiles_never_mean_more_work_or_more_memory_than_the_limit(limit, monkeypatch) -> None:
    Gpu(monkeypatch, free=2**40)
    model = OneB()
    levels = model.plan(16384, limit)
    tiled = model.layers[0].tiled
    assert model.takes(levels, 16384, tiled) <= limit
    assert tiled == (limit < 20), "everything fits into 20 GiB as it is"
    of_layers = [layer.levels(1, 16384) for layer in model.layers]
    without = assign(of_layers, memory.budget(model, model.layers, 1, 16384, 0, False, limit))
    assert again(of_layers, levels) <= again(of_layers, without)


@pytest.mark.parametrize(("kind", "tiled"), [("plain", {8192, 16384, 32768}), ("full", {16384, 32768})])
def test_tiles_where_they_save_memory(kind, tiled) -> None:
    """The gradients of trained weights are sums in 32 bits, which a few thousand rows do not pay for."""
    layer = OneB(kind).layers[0]
    saves = {n for n in (1024, 4096, 8191, 8192, 16384, 32768) if layer.workspace(1, n, True) < layer.workspace(1, n)}
    assert saves == tiled


@pytest.mark.parametrize(
    ("optimizer", "width", "size"),
    [(Optimizer.sgd, 4, 0), (Optimizer.adamw_8bit, 4, 2), (None, 4, 8), (None, 2, 4), (Optimizer.adamw_torch, 2, 4)],
)
def test_state_of_the_optimizer(optimizer, width, size) -> None:
    """PyTorch's moments are as wide as the weight."""
    words = [] if optimizer is None else [f"trainer.optimizer={optimizer.value}"]
    _, plan = runs.prepared([*WORDS, "+trainer=sft", *words])
    assert memory.optimizer_bytes(plan, width) == size
    if optimizer in (None, Optimizer.adamw_torch):
        weight = torch.nn.Parameter(torch.ones(5, dtype={2: torch.bfloat16, 4: torch.float32}[width]))
        weight.grad = torch.ones_like(weight)
        made = torch.optim.AdamW([weight], fused=optimizer is None)
        made.step()
        moments = [one for one in made.state[weight].values() if one.numel() == 5]
        assert sum(one.numel() * one.element_size() for one in moments) == 5 * size


def test_graphs_follow_the_layers_order_on_a_gpu_and_nowhere_else(monkeypatch) -> None:
    fakes = [Fake(), Fake(), Fake()]
    blocks = []
    for fake in fakes:
        block = torch.nn.Linear(1, 1)
        block.ftcore_recompute = fake
        blocks.append(block)
    model = torch.nn.Sequential(*blocks)
    text = SimpleNamespace(num_hidden_layers=3, hidden_size=8, vocab_size=16)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    plan, _ = fresh()
    for device, graphs in ((plan.device, Graphs.auto), (Gpu(monkeypatch, 0), Graphs.off)):
        memory.apply(replace(plan, device=device, run=replace(plan.run, memory=Memory.off, graphs=graphs)), model)
        assert [fake.followed for fake in fakes] == ["nobody"] * 3
    plan = replace(plan, device=Gpu(monkeypatch, 0), run=replace(plan.run, memory=Memory.off, graphs=Graphs.auto))
    memory.apply(plan, model)
    assert [fake.followed for fake in fakes] == [None, fakes[0], fakes[1]]


def test_levels_of_a_layer_are_in_order() -> None:
    """Each keeps more than the one before and computes less again; of a real size, more memory is never more work."""
    _, model = fresh()
    recompute = layers_of(model)[0].ftcore_recompute
    for rows, length in ((1, 1), (2, 333), (8, 8192)):
        levels = list(recompute.levels(rows, length))
        assert [level.kept for level in levels] == sorted({level.kept for level in levels})
        assert [level.again for level in levels] == sorted({level.again for level in levels}, reverse=True)
        work = [
            again([levels] * 4, assign([levels] * 4, b)) for b in range(0, 4 * levels[-1].kept, levels[-1].kept // 50)
        ]
        assert work == sorted(work, reverse=True)


def test_runs_that_are_loaded_are_told() -> None:
    model, _ = ftcore.load([*WORDS, "memory=least"])
    assert layers_of(model)[0].ftcore_recompute.choose(2, 64) == 0


def test_the_optimizers_state_is_reserved_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    asked, allocated = [], [1000]
    monkeypatch.setattr(memory, "_allocated", lambda: allocated[0])
    monkeypatch.setattr(
        memory, "budget", lambda model, layers, rows, length, state, recorded, limit, tiled: asked.append(state)
    )
    plan = SimpleNamespace(run=SimpleNamespace(memory_limit=None, trainer=None))
    fills = memory.room(plan, model, [])
    fills(1, 1, 0, False, False)
    model.weight.grad = torch.zeros(10, 10)
    allocated[0] += 400  # the gradient
    fills(1, 1, 2, False, False)  # a third micro-batch, and no step yet
    allocated[0] += 800  # two moments of 100 parameters
    fills(1, 1, 3, False, False)
    assert asked == [8, 8, 0]
