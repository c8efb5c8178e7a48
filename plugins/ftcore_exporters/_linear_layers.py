"""Which layers of a model are packed into fewer bits, by the names of published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftcore import Plan, Problem, Refused
from ftcore.weights import Weights
from ftcore_exporters._merging import not_writing, reads_images, unmergeable

EXPERT = re.compile(r"\.experts\.\d+\.[^.]+\.weight$")
"""Published names of the linear layers of one expert."""
PLAIN = "use '+export=[safetensors]'"


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model by their published names, without `.weight`."""

    quantized: tuple[str, ...]
    left: tuple[str, ...]
    """Those that keep 16 bits: the head, and the routers of experts."""
    inputs: frozenset[int]
    """Row lengths of the quantized ones."""

    @property
    def experts(self) -> bool:
        """Whether experts are among them."""
        return any(EXPERT.search(f"{name}.weight") for name in self.quantized)


def layers_of(config: Any, auto_class: str, weights: Weights | None = None) -> Layers:
    """Every linear layer but the head is quantized, experts one by one; routers are none of transformers' linears.

    :param config: the merged model's.
    :param weights: those of the merged model; None takes the shapes that follow from the config.

    Raises Refused where experts are not published one by one.
    """
    import torch
    import transformers
    from torch import nn

    from ftcore.merge import model_weights

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    weights = model_weights(model) if weights is None else weights
    if fused := [n for n, w in weights.items() if ".experts." in n and w.shape and not EXPERT.search(n)]:
        raise Refused(Problem("export", f"the experts of a layer are published as one tensor ({fused[0]})", PLAIN))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    embedding = {name for name, module in model.named_modules() if module is model.get_input_embeddings()}
    matrices = [n.removesuffix(".weight") for n, w in weights.items() if n.endswith(".weight") and len(w.shape) == 2]
    quantized = tuple(n for n in matrices if n in linear - head or EXPERT.search(f"{n}.weight"))
    left = head.union(matrices).difference(quantized, embedding)
    inputs = frozenset(weights[f"{name}.weight"].shape[1] for name in quantized)
    return Layers(quantized, tuple(sorted(left)), inputs)


def problems(plan: Plan, name: str) -> list[Problem]:
    """Why an exporter that packs linear layers cannot take the plan's model; no weight is read."""
    found = [*unmergeable(plan), *not_writing(plan, name), *reads_images(plan, name)]
    return found or [*_layer_problems(plan)]


def _layer_problems(plan: Plan) -> Iterator[Problem]:
    try:
        planned(plan)
    except Refused as refused:
        yield from refused.problems


def planned(plan: Plan) -> Layers | None:
    """The layers as the plan's config has them; None where the config cannot be read, which another check names.

    Raises what `layers_of` raises.
    """
    from ftcore import checkpoint

    assert plan.run.model is not None
    try:
        config = checkpoint.config_of(plan.run.model, plan.family)
    except (OSError, ValueError, KeyError, Refused):
        return None
    return layers_of(config, plan.family.auto_class)
