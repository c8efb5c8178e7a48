"""Short causal convolutions in place of attention, as LFM2 has them: each row keeps its last few inputs.

`out(c * conv(b * x))`, with b, c and x from one projection; the convolution is over time, a filter for each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Mix = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""The convolution of a layer for a call: from its number, its input `[B, S, H]` and its filters `[H, K]`."""


@dataclass(frozen=True)
class Tail:
    """What a row keeps of one layer."""

    length: int
    """K - 1 inputs."""
    width: int

    def bytes_of(self, dtype: torch.dtype) -> int:
        """For one row."""
        return self.length * self.width * dtype.itemsize


def packed(
    x: torch.Tensor, filters: torch.Tensor, state: torch.Tensor, rows: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Of prompts one behind the other, `[1, T, H]` -> the same; their last inputs are kept.

    :param filters: `[H, K]`; the last column is for the token itself.
    :param state: `[R, K - 1, H]`, written to.
    :param rows: Int64 `[T]`: the row of each token.
    :param places: Int64 `[T]`: its place in its prompt.
    """
    kept = filters.shape[1] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    back = torch.nn.functional.pad(x, (0, 0, kept, 0))
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = places[1:] == 0
    ends = last.nonzero()[:, 0]
    for behind in range(kept + 1):
        earlier = back[:, kept - behind : back.shape[1] - behind]
        earlier = torch.where((places >= behind)[:, None], earlier, 0)
        out += earlier * filters[:, kept - behind].to(wide)
        if behind < kept:
            state[rows[ends], kept - 1 - behind] = earlier[0, ends]
    return out.to(x.dtype)


def stepped(x: torch.Tensor, filters: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Of one new token a row, `[B, 1, H]` -> the same; it takes its place in `state` `[B, K - 1, H]`."""
    inputs = torch.cat((state, x), 1)
    state.copy_(inputs[:, 1:])
    wide = torch.promote_types(x.dtype, torch.float32)
    return (inputs.to(wide) * filters.T.to(wide)).sum(1, keepdim=True).to(x.dtype)


def gated(mix: Mix, index: int, module: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The forward of such a module, `[B, S, H]` -> the same; what it is given for a cache of its own is not asked."""
    b, c, x = module.in_proj(hidden_states).chunk(3, dim=-1)
    y = mix(index, b * x, module.conv.weight[:, 0])
    if module.conv.bias is not None:
        y = y + module.conv.bias
    out: torch.Tensor = module.out_proj(c * y)
    return out
