"""Keys and values of a conversation between its turns: a turn reads only what is behind the tokens that are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from weakref import ref

from torch import nn

from ftcore_kernels.decoding.cache import Cache

OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
"""Attributes of PEFT's layers that say which adapter computes."""


class Weights:
    """Those of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._versions = [(ref(weight), weight._version) for weight in model.parameters()]
        self._adapters = _adapters(model)

    def are(self, model: nn.Module) -> bool:
        """Whether nobody wrote to one of them since, but through `.data`, or chose another adapter."""
        now = list(model.parameters())
        return (
            len(now) == len(self._versions)
            and self._adapters == _adapters(model)
            and all(
                weight is old() and weight._version == version
                for weight, (old, version) in zip(now, self._versions, strict=True)
            )
        )


def _adapters(model: nn.Module) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return [repr(getattr(layer, name, None)) for layer in layers for name in OF_ADAPTERS]


@dataclass
class Kept:
    """What one row of a cache holds."""

    weights: Weights
    """With which it was written, as they are between the turns."""
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are there; what lies behind them may be anything."""
    cache: Cache | None = None

    def resumed(self, prompt: Sequence[int], length: int, made: Callable[[], Cache]) -> tuple[Cache, int]:
        """A cache of that length, and how many of the prompt's first tokens it holds: never the last one.

        :param made: Makes an empty cache, for where nothing can be kept.
        """
        cache, self.cache = self.cache, None  # until it is whole: what ends this half way leaves nothing
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt[:-1], strict=False))
        self.ids = self.ids[: 0 if cache is None else sum(1 for _ in same)]
        if cache is None or not self.ids:
            cache = None  # gives its memory back before another takes some
            cache = made()
        elif cache.length < length:
            cache.lengthen(length, len(self.ids))
        if cache.cuts:
            self.cache = cache
        return cache, len(self.ids)
