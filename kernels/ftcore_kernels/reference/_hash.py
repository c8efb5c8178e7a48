"""Noise that depends on nothing but numbers, on every device: `lowbias32` of Wellons' hash-prospector, of 32 bits."""

from __future__ import annotations

from typing import TypeVar

import torch

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9

Words = TypeVar("Words", int, torch.Tensor)


def mix(x: Words) -> Words:
    """Of a number below 2^32, or of int64 tensors of such, one that looks like chance."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & WORD
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) & WORD
    return x ^ (x >> 15)


def spread(key: Words, at: torch.Tensor) -> torch.Tensor:
    """Noise of every place, int64 below 2^32: `at` and `key` broadcast."""
    return mix(mix((at * GOLDEN + key) & WORD) ^ key)
