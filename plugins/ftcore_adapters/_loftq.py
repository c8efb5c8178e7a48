"""LoftQ: A and B start as what 4-bit rounding took from each weight (Li et al. 2023, arXiv 2310.08659).

One step of the paper's alternation, from the 4-bit weights Q that the quantizer made: A and B are the best rank-r
approximation of W - Q, by its singular value decomposition. Q stays what every other run over the same checkpoint has,
so the trained adapter is a plain one. It is PEFT's `replace_lora_weights_loftq`, but on any device, under the names of
any checkpoint, and with the product divided by the adapter's scale: PEFT's own start is right only for alpha = r.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, checkpoint
from ftcore.catalog import installed
from ftcore.errors import Exit, Refused
from ftcore.report import note
from ftcore.safetensors_file import indexed_files

if TYPE_CHECKING:
    import torch

KEY = "adapter.init"


def problems(plan: Plan) -> Iterator[Problem]:
    """There is something to make up for: weights that can be read and that are rounded to 4 bits in this run."""
    assert plan.run.model is not None
    model, quantizer = plan.run.model, plan.run.quantizer
    try:
        config = {} if model.tiny else checkpoint.read_config(model, plan.family) or {}
    except Refused:  # named by core's own check
        return
    if config.get("quantization_config"):
        message = "`loftq` needs the weights before rounding, and the checkpoint is already quantized"
        yield Problem(KEY, message, "start from the 16-bit checkpoint with +quantizer=bnb_nf4")
    elif quantizer is None:
        message = "`loftq` makes up for 4-bit rounding, and no weight is rounded"
        yield Problem(KEY, message, "add +quantizer=bnb_nf4, or leave adapter.init out")
    elif not getattr(installed().find("quantizer", quantizer.name).load(), "FOUR_BIT", False):
        message = f"`loftq` makes up for 4-bit rounding, and {quantizer.name} does not round to 4 bits"
        yield Problem(KEY, message, "use +quantizer=bnb_nf4, or leave adapter.init out")
    elif model.path and not any(Path(model.path).glob("*.safetensors")):
        yield _unreadable(model.path)


def start(model: Any, plan: Plan) -> None:
    """Set A and B of every adapted 4-bit layer; what else is adapted keeps its start."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    assert plan.run.model is not None
    base = model.get_base_model()
    layers = {path: m for path, m in base.named_modules() if type(getattr(m, "base_layer", None)).__name__ == KIND}
    if not layers:
        raise Refused(Problem(KEY, "`loftq` finds no adapted layer of 4 bits", "leave adapter.init out"))
    original = Original(base, checkpoint.locate(plan.run.model, plan.family), plan.run.model.revision)
    whole = lost = left = 0.0
    with torch.no_grad():
        for path, layer in layers.items():
            quantized = layer.base_layer.weight
            rounded = dequantize_4bit(quantized.data, quantized.quant_state).float()
            weight = original.weight(f"{path}.weight", rounded.shape).to(rounded)
            values, rank = fit(layer, weight - rounded)
            whole += float(weight.square().sum())
            lost += float(values.square().sum())
            left += float(values[rank:].square().sum())
    before, after = (lost / whole) ** 0.5, (left / whole) ** 0.5
    note(f"loftq: rounding moved the weights of {len(layers)} layers by {before:.2%}; with A and B it is {after:.2%}")


KIND = "Linear4bit"
"""bitsandbytes' layer."""


def fit(layer: Any, lost: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Make scale * BA the best approximation of `lost`; returns its singular values, and how many BA has.

    A rank above the weight's own leaves the rest of A as it was, and that of B zero.
    """
    import torch

    (name,) = layer.active_adapters
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    rank = min(layer.r[name], *lost.shape)
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    a[:rank] = root[:, None] * right[:rank]
    b[:, :rank] = left[:, :rank] * root
    if name in layer.lora_magnitude_vector:  # DoRA's norms are those of the weights with A and B
        layer.lora_magnitude_vector[name].update_layer(base_layer=layer.base_layer, lora_A=a, lora_B=b, scaling=scale)
    return values, rank


class Original:
    """The checkpoint's weights by the names of the model's, read one at a time."""

    def __init__(self, base: Any, place: str, revision: str | None) -> None:
        self._base, self._place = base, place
        self._files = _files(place, revision)

    def weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The weight before rounding."""
        import torch
        from safetensors import safe_open
        from transformers.core_model_loading import revert_weight_conversion

        renamed, *more = revert_weight_conversion(self._base, {name: torch.empty(shape, device="meta")})
        prefix = f"{self._base.base_model_prefix}."  # a checkpoint of the model without its head has none
        found = next((n for n in (renamed, name, renamed.removeprefix(prefix)) if n in self._files), None)
        if more or found is None:
            message = f"`loftq` finds {name} in the checkpoint under no name of its own"
            raise Refused(Problem(KEY, message, "leave adapter.init out, or the layer out of adapter.targets"))
        with safe_open(self._files[found], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(found)
        return tensor


def _files(place: str, revision: str | None) -> dict[str, str]:
    """The names in a checkpoint's safetensors, and the file of each."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    try:
        index = cached_file(place, "model.safetensors.index.json", revision=revision)
    except OSError:  # one file alone has no index
        index = None
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        indexed_files(Path(index))  # refuses names of files elsewhere
        return {name: str(Path(index).with_name(file)) for name, file in names.items()}
    try:
        single = str(cached_file(place, "model.safetensors", revision=revision))
    except OSError:
        raise Refused(_unreadable(place)) from None
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _unreadable(place: str) -> Problem:
    message = f"`loftq` reads the weights before rounding from safetensors, and {place} has none"
    return Problem(KEY, message, "save the checkpoint again with transformers", Exit.MISSING_INPUT)
