"""From the names of a loaded model to those of published checkpoints, without all of its weights at once.

transformers stores some weights otherwise than the hub: the experts of a layer as one tensor, for example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ftcore.weights import Weight, Weights

if TYPE_CHECKING:
    import torch


def published(model: Any, weights: Mapping[str, Weight]) -> Weights:
    """The same weights under published names.

    :param model: the transformers model, which knows how its checkpoint was turned.

    A weight that becomes others is read whole when one of them is, and kept until one of another weight is read.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    hollow = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in weights.items()}
    turned = revert_weight_conversion(model, hollow)
    if turned.keys() == hollow.keys():
        return dict(weights)
    alone = {name: revert_weight_conversion(model, {name: value}) for name, value in hollow.items()}
    found = {target: name for name, targets in alone.items() for target in targets}
    if found.keys() != turned.keys():  # some come from several weights together
        whole = functools.cache(lambda: revert_weight_conversion(model, {n: w.whole() for n, w in weights.items()}))
        return {target: _part(value, whole, target) for target, value in turned.items()}

    @functools.lru_cache(maxsize=1)
    def of_one(name: str) -> Mapping[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: weights[name].whole()})
        return parts

    result: dict[str, Weight] = {}
    for name, targets in alone.items():
        if list(targets) == [name]:
            result[name] = weights[name]
        elif len(targets) == 1 and next(iter(targets.values())).shape == weights[name].shape:
            result[next(iter(targets))] = weights[name]  # only its name is another
        else:
            parts = functools.partial(of_one, name)
            result |= {target: _part(value, parts, target, weights[name].exact) for target, value in targets.items()}
    return result


def _part(
    hollow: torch.Tensor, turned: Callable[[], Mapping[str, torch.Tensor]], name: str, exact: bool = False
) -> Weight:
    def read(start: int, stop: int) -> torch.Tensor:
        value = turned()[name]
        return (value[start:stop] if value.dim() else value).contiguous()

    return Weight(tuple(hollow.shape), hollow.dtype, read, exact)
