"""What `ftcore plan` says of a GPU: for each memory setting whether the run fits, how long its rows may become, how
many there may be at once, and how long a step takes; and what would fit where none does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ftcore.cards import Card, called, of_size, present
from ftcore.catalog import installed
from ftcore.config import Memory, Optimizer, QuantizerConfig
from ftcore.errors import Problem
from ftcore.forecast import PROMPT, STEP, Forecast, Layout, allowed, free
from ftcore.held import BITS
from ftcore.hooks import PROJECT
from ftcore.report import heading, note, table
from ftcore.specs import Plan
from ftcore.step_time import Pace

ORDER = (Memory.off, Memory.least, Memory.offload, Memory.auto)
WRITTEN = "max_completion_length"
"""Setting of the trainers whose model writes what it learns from."""
HEADER = ("", "", "longest row", "rows", "host", "~ step", "~ tokens/s")


Problems = Callable[[Plan], Sequence[Problem]]
"""What is said against a plan."""


def no_problems(plan: Plan) -> Sequence[Problem]:
    """Nothing."""
    return ()


def show(plan: Plan, model: Any, problems: Problems = no_problems) -> None:
    """Print the table for the GPU that was asked for, or this machine's; nothing where there is neither.

    :param problems: Asked of settings that would fit, so that none is named that is refused.
    """
    size = gibibytes(plan)
    if size is None or plan.run.trainer is None:
        return
    heading(f"Memory of a GPU of {round(size, 1):g} GiB (a forecast)")
    forecast = Forecast.of(plan, model)
    if isinstance(forecast, str):
        note(f"  none: {forecast}")
        return
    card, room = card_of(plan), free(size)
    rows, length = forecast.rows, forecast.length
    header = (HEADER[0], f"{rows} x {length:,} tokens", HEADER[2], f"rows of {length:,}", *HEADER[4:])
    rooms = {memory: allowed(plan, room) if memory is Memory.auto else room for memory in ORDER}
    lines = [line(forecast, card, memory, rooms[memory]) for memory in ORDER]
    table(lines, header)
    bits = "" if forecast.width < 4 else ", in 16 bits: float32 takes several times as long"
    note(f"  auto: {means(forecast, rows, length, rooms[Memory.auto])}; times as on a {card.name}{bits}")
    if not any(forecast.fits(memory, rows, length, rooms[memory]) for memory in ORDER):
        note(f"  none of these fits: {next_setting(forecast, room, problems)}")


def gibibytes(plan: Plan) -> float | None:
    """Of the GPU that is asked about; None where nobody asked and there is none."""
    run = plan.run
    if run.gpu_memory is not None:
        return run.gpu_memory
    if run.gpu is not None and (card := called(run.gpu)) is not None:
        return card.there
    return plan.device.memory / 2**30 if plan.device.kind == "cuda" else None


def card_of(plan: Plan) -> Card:
    """Whose times are said: the card that was named, this machine's, or one of the size that was asked about."""
    if plan.run.gpu is not None and (card := called(plan.run.gpu)) is not None:
        return card
    if plan.device.kind == "cuda" and plan.run.gpu_memory is None:
        return present(plan.device)
    size = gibibytes(plan)
    assert size is not None
    return of_size(size)


def line(forecast: Forecast, card: Card, memory: Memory, room: int) -> Sequence[str]:
    """A row of the table."""
    rows, length = forecast.rows, forecast.length
    peak, there = forecast.peak(memory, rows, length, room), forecast.fits(memory, rows, length, room)
    too_much = ", too much" if peak > room else ", too much for the host"
    said = f"{peak / 2**30:.1f} GiB" + ("" if there else too_much)
    longest, most = forecast.longest(memory, room), forecast.most_rows(memory, length, room)
    if not there:
        return f"memory={memory.value}", said, f"{longest:,}", f"{most:,}", "-", "-", "-"
    pace = Pace(forecast, card)
    step, rate = pace.step(memory, rows, length, room), pace.rate(memory, rows, length, room)
    host = forecast.host(memory, rows, length, room)
    return (
        f"memory={memory.value}",
        said,
        f"{longest:,}",
        f"{most:,}",
        f"{host / 2**30:.1f} GiB" if host else "0",
        f"~ {step:.2g} s" if step < 10 else f"~ {step:,.0f} s",
        f"~ {float(f'{rate:.2g}'):,.0f}",
    )


def means(forecast: Forecast, rows: int, length: int, room: int) -> str:
    """What `memory=auto` would do on such a micro-batch."""
    layout = forecast.layout(Memory.auto, rows, length, room)
    whole = forecast.layout(Memory.off, rows, length).levels
    if layout.levels == whole and layout.store is None:
        return "nothing is computed again"
    return ", ".join(_described(layout, whole))


def _described(layout: Layout, whole: Sequence[int]) -> Iterator[str]:
    again = sum(level < most for level, most in zip(layout.levels, whole, strict=True))
    yield f"{again} of {len(whole)} layers compute a part again"
    if layout.store is not None and layout.store.away:
        yield f"the inputs of {layout.store.away} wait in host memory"
    if layout.store is not None and layout.store.attended:
        yield f"what the attention of {layout.store.attended} gave waits there too"
    if layout.store is not None and layout.store.made_again:
        yield f"{layout.store.made_again} compute their forward once more"
    if layout.tiled:
        yield "in tiles where rows are many"


@dataclass(frozen=True)
class _Other:
    """A run with other settings, and the words that make it so."""

    words: tuple[str, ...]
    forecast: Forecast


def next_setting(forecast: Forecast, room: int, problems: Problems = no_problems) -> str:
    """The first setting that would fit and that the run can have, or that none is known."""
    trainer = forecast.plan.run.trainer
    assert trainer is not None
    rows, length = forecast.rows, forecast.length
    fewer = [n for n in range(rows, 0, -1) if trainer.global_batch % n == 0 and n >= forecast.passes.least_rows]
    others = list(_others(forecast))

    @cache
    def runs(other: int) -> bool:
        """Whether nothing is said against it that is not said of the run as it is: asked where it fits, for it reads
        rows."""
        return other == 0 or set(problems(others[other].forecast.plan)) <= set(problems(forecast.plan))

    for number in fewer:
        for index, other in enumerate(others):
            for memory in (Memory.least, Memory.offload):
                if other.forecast.fits(memory, number, length, room) and runs(index):
                    words = (*other.words, f"memory={memory.value}")
                    return "set " + " ".join((*words, *([f"trainer.micro_batch={number}"] if number != rows else [])))
    last = next(others[index] for index in reversed(range(len(others))) if runs(index))
    number = fewer[-1]
    least = PROMPT + STEP if forecast.passes.written else STEP
    shorter = (_of_rows(last.forecast, n) for n in range(length // STEP * STEP, least - 1, -STEP))
    short = next(
        (other for other in shorter if other.forecast.fits(Memory.offload, number, other.forecast.length, room)), None
    )
    if short is None:
        return "no setting of this model does; take a smaller model"
    words = (*last.words, "memory=offload", *short.words)
    return "set " + " ".join((*words, *([f"trainer.micro_batch={number}"] if number != rows else [])))


def _of_rows(forecast: Forecast, length: int) -> _Other:
    """The run with rows of so many tokens at most: a completion has a prompt before it."""
    trainer, passes = forecast.plan.run.trainer, forecast.passes
    assert trainer is not None
    settings: dict[str, int] = {}
    if passes.written + PROMPT > length and hasattr(trainer, WRITTEN):
        settings[WRITTEN] = length - PROMPT
        passes = replace(passes, written=length - PROMPT)
    if trainer.max_length > length:
        settings["max_length"] = length
    words = [f"trainer.{name}={value}" for name, value in settings.items()]
    return _Other(tuple(words), replace(forecast.instead(**settings), passes=passes))


def _others(forecast: Forecast) -> Iterator[_Other]:
    """The run as it is, with moments in 8 bits, with frozen weights in 4 bits, and with both."""
    plan = forecast.plan
    assert plan.run.trainer is not None
    small = {"optimizer": Optimizer.adamw_8bit} if forecast.state_bytes > 2 else {}
    quantizer = _fewest_bits() if forecast.adapted and plan.run.quantizer is None else None
    word = "trainer.optimizer=adamw_8bit"
    yield _Other((), forecast)
    if small:
        yield _Other((word,), forecast.instead(**small))
    if quantizer is not None:
        quantized = replace(forecast, plan=replace(plan, run=replace(plan.run, quantizer=quantizer)))
        yield _Other((f"+quantizer={quantizer.name}",), quantized)
        if small:
            yield _Other((f"+quantizer={quantizer.name}", word), quantized.instead(**small))


def _fewest_bits() -> QuantizerConfig | None:
    """Of the quantizers that come with ftcore, that with the smallest weights: others are not imported for a hint."""
    found = []
    for option in installed().options("quantizer"):
        bits = getattr(option.load(), BITS, None) if option.dist == PROJECT else None
        if bits is not None:
            config = option.config_class()(name=option.name)
            assert isinstance(config, QuantizerConfig)
            found.append((bits(config), option.name, config))
    return min(found, key=lambda one: one[:2])[2] if found else None
