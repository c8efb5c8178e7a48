"""What to set when a batch did not fit: the next setting that takes less, and the longest row that it has room for."""

from __future__ import annotations

from typing import Any

from ftcore.config import Memory
from ftcore.memory import OFFLOADED, Applied, budget, host_room, layers_that_choose
from ftcore.report import size
from ftcore.store import sizes, stored

STEP = 256
"""Tokens that a row's length is found to."""
LONGEST = 2**23
"""Tokens that nobody looks beyond."""
LOWER = "lower trainer.micro_batch or trainer.max_length"


def remedy(model: Any, stepped: bool = True, of_host: bool = False) -> str:
    """For a model that `memory` was applied to, once the batch that did not fit is gone.

    :param stepped: Whether the optimizer has its state already.
    :param of_host: Whether it was the host's memory that was short.
    """
    import torch

    applied, layers = getattr(model, "ftcore_memory", Applied(Memory.auto)), layers_that_choose(model)
    mode, state = applied.mode, 0 if stepped else applied.state
    if of_host:
        return f"set memory=least, which leaves nothing in host memory, or {LOWER}"
    if not torch.cuda.is_available() or not layers:
        return LOWER if mode in (Memory.least, Memory.offload) else f"set memory=least, or {LOWER}"
    longest = longest_row(model, layers, state, host_room(OFFLOADED, applied.there), applied.sequences)
    if longest == 0:
        return f"free some of the GPU, or take a smaller model: with {size(_free(model, layers, state))} no row fits"
    fits = f"longest row that fits: {longest:,} tokens"
    if mode is Memory.offload:
        return f"{LOWER} ({fits})"
    return f"set memory=offload ({fits}), or {LOWER}"


def longest_row(model: Any, layers: list[Any], state: int, host: int, sequences: int = 1) -> int:
    """Tokens of the longest single row that `memory=offload` has room for now; 0 if it has for none.

    :param host: Bytes of host memory for inputs.
    :param sequences: Of a row, which are read at once.
    """

    def fits(length: int) -> bool:
        free = budget(model, layers, sequences, length, state, False, None, True)
        return stored(layers, sequences, length, free, host).gpu_bytes(sizes(layers, sequences, length)) <= free

    low, high = 0, STEP
    while high <= LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // (2 * STEP) * STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _free(model: Any, layers: list[Any], state: int) -> int:
    return max(budget(model, layers, 1, 1, state, False, None, True), 0)
