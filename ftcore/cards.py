"""GPUs by name, as far as a forecast of time needs to know them. `cards.json` has the vendors' figures.

`tflops` are dense products in 16 bits with sums in 32, `bandwidth` and `host` (host memory, one way) GB/s, `memory` GB
as the vendor counts it. `there` is the GiB that PyTorch finds of it, less where error correction takes a part: of RTX
4090 and 5090, L40S and H200 as its messages have it, rounded down, of the others an estimate. `host` is what a large
copy reaches, not the bus's own figure.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore.device import Device

OTHERS = frozenset({"pcie", "nvl", "mig", "laptop", "ti", "d"})
"""Words that make a GPU another one than the card whose name is in its name."""


@dataclass(frozen=True)
class Card:
    """What a GPU can do."""

    name: str
    memory: float
    """GB by its name."""
    there: float
    """GiB that a program finds."""
    flops: float
    """Floating-point operations a second of 16-bit products."""
    bandwidth: float
    """Bytes a second of its own memory."""
    host: float
    """Bytes a second to or from host memory."""


@functools.cache
def cards() -> dict[str, Card]:
    """All that are known, by name."""
    found = json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))
    return {
        name: Card(name, of["memory"], of["there"], of["tflops"] * 1e12, of["bandwidth"] * 1e9, of["host"] * 1e9)
        for name, of in found.items()
    }


def called(name: str) -> Card | None:
    """The card that a name means: all words of the card's are in it, in any case, as in `NVIDIA H100 80GB HBM3`."""
    words = set(_words(name))
    exact = [card for card in cards().values() if set(card.name.casefold().split()) <= words]
    # Of one name with several sizes, or forms, the first that has the asked-for words.
    return next(iter(exact or [card for card in cards().values() if _model(card) in words]), None)


def _words(name: str) -> list[str]:
    return name.casefold().replace("-", " ").split()


def of_size(gibibytes: float) -> Card:
    """A card of that much memory: the one next in size."""
    return min(cards().values(), key=lambda card: abs(card.memory - gibibytes))


def present(device: Device) -> Card:
    """This machine's GPU, by its name, or else measured."""
    other = OTHERS & set(_words(device.name))
    return (None if other else called(device.name)) or measured(device.name)


@functools.cache
def measured(name: str) -> Card:
    """The GPU that is there, by a product, a copy within its memory and a copy to it: less than a second."""
    import torch

    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    size = 4096
    a = torch.ones((size, size), dtype=dtype, device="cuda")
    b = torch.empty_like(a)
    host = torch.empty((size, size), dtype=dtype, pin_memory=True)
    product, copied, moved = (
        _seconds(torch, work)
        for work in (lambda: torch.mm(a, a, out=b), lambda: b.copy_(a), lambda: b.copy_(host, non_blocking=True))
    )
    bytes_ = a.numel() * a.element_size()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Card(name, memory, memory, 2 * size**3 / product, 2 * bytes_ / copied, bytes_ / moved)


def _seconds(torch: Any, work: Any, times: int = 20) -> float:
    """Of one run, after two that do not count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(times + 2):
        if turn == 2:
            begin.record()
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / times


def _model(card: Card) -> str:
    """The word with digits that tells a card from others: `h100`, `4090`."""
    return next(word for word in card.name.casefold().split() if any(letter.isdigit() for letter in word))
