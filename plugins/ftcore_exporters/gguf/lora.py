"""The LoRA adapter alone as GGUF: for `llama-server --lora`, over the base model's own file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import GGMLQuantizationType as Type

from ftcore import Checkpoint, Plan, Problem, Refused
from ftcore.merge import ties
from ftcore.paths import whole_file
from ftcore.published_names import published
from ftcore.rope import scaling
from ftcore.stored_merge import PREFIX, STARTS, scale
from ftcore.weights import Weight
from ftcore_exporters.gguf.tensors import Tensor, changes_of, gguf_name, name_map
from ftcore_exporters.gguf.writing import write

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from ftcore.gguf_facts import Gguf

MERGE = "export the merged model: export.gguf.types=[q8_0]"


@dataclass(frozen=True)
class Pair:
    """One adapted layer: W + scale B A."""

    a: torch.Tensor
    """`[r, in]`"""
    b: torch.Tensor
    """`[out, r]`"""
    scale: float

    @property
    def alpha(self) -> float:
        """What llama.cpp divides by the rank to have the scale."""
        return self.scale * self.a.shape[0]


def lora_problems(plan: Plan) -> list[Problem]:
    """Why the run's adapter cannot be written as GGUF, as far as its config tells."""
    adapter: Any = plan.run.adapter
    if adapter is None or adapter.name != "lora":
        name = adapter.name if adapter is not None else "full"
        return [Problem("export.gguf", f"adapter={name} trains no LoRA that could be written alone", MERGE)]
    assert plan.run.model is not None
    reasons = {
        "DoRA also scales the weights, which llama.cpp's adapters do not": adapter.variant.value == "dora",
        f"{', '.join(adapter.modules_to_save)} is trained whole": bool(adapter.modules_to_save),
        "the rows of new tokens are trained whole": bool(plan.run.model.new_tokens),
        "it was trained over another RoPE than the base's": bool(scaling(plan.run.model, plan.family)),
        f"adapter.init={adapter.init.value} changes the base's weights": adapter.init.value
        not in ("default", "gaussian"),
    }
    return [Problem("export.gguf", f"not as an adapter: {why}", MERGE) for why, found in reasons.items() if found]


def write_lora(checkpoint: Checkpoint, path: Path) -> None:
    """Write the adapter in float32: `<tensor>.lora_a` `[r, in]` and `<tensor>.lora_b` `[out, r]`.

    llama.cpp scales an adapter by `adapter.lora.alpha` / r. Layers that PEFT scales otherwise (rsLoRA, a rank or alpha
    of their own) have the rest of their scale in B. The rows of B are in the order of the base's rows in its own file.

    Raises Refused for what such a file cannot hold: DoRA, modules and biases trained whole, adapted experts.
    """
    plan, facts = checkpoint.plan, checkpoint.plan.family.gguf
    if found := lora_problems(plan):
        raise Refused(*found)
    assert facts is not None
    config: Any = checkpoint.base().config
    pairs = _pairs(checkpoint)
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    tensors = [t for name, pair in pairs.items() for t in _tensors(name, pair, alpha, config, facts)]
    writer = gguf.GGUFWriter(None, facts.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    assert plan.run.model is not None
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, plan.run.model.id.rpartition("/")[2])
    with whole_file(path) as file:
        write(writer, tensors, {tensor.name: Type.F32 for tensor in tensors}, file)


def _pairs(checkpoint: Checkpoint) -> dict[str, Pair]:
    """Published names of the adapted weights to their A and B."""
    from peft import get_peft_model_state_dict

    model: Any = checkpoint.model
    settings = model.peft_config[model.active_adapters[0]]
    _check(settings)
    state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model)
    pairs = {}
    for key, a in state.items():
        layer, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise _no_place(key.removeprefix(PREFIX))
        if kind == "A.weight":
            b = state[f"{PREFIX}{layer}.lora_B.weight"]
            factor = scale(settings.to_dict(), layer, a.shape[0])
            pairs[_published(checkpoint.base(), f"{layer}.weight", (b.shape[0], a.shape[1]))] = Pair(a, b, factor)
    return pairs


def _check(settings: Any) -> None:
    """Refuse what an adapter's own config says that a run's need not."""
    reasons = {
        "it is no LoRA": settings.peft_type.value != "LORA",
        "DoRA also scales the weights": settings.use_dora,
        "modules are trained whole": settings.modules_to_save or settings.trainable_token_indices,
        "biases are trained": settings.bias != "none" or settings.lora_bias,
        "experts are adapted as one parameter": settings.target_parameters,
        "it was started in a way that changes the base's weights": settings.init_lora_weights not in STARTS,
    }
    for why, found in reasons.items():
        if found:
            raise Refused(Problem("export.gguf", f"not as an adapter: {why}", MERGE))


def _published(base: Any, name: str, shape: tuple[int, ...]) -> str:
    """The published name of a loaded model's weight."""
    import torch

    def nothing(start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError  # only the name is asked for

    found = list(published(base, {name: Weight(shape, torch.float32, nothing)}))
    if len(found) != 1:
        raise _no_place(name)
    return found[0]


def _tensors(name: str, pair: Pair, alpha: float, config: PretrainedConfig, facts: Gguf) -> Iterator[Tensor]:
    """A and B as tensors of the file."""
    text = config.get_text_config()
    if not name.startswith(facts.part) or (ties(config).tie_word_embeddings and name.endswith("lm_head.weight")):
        raise _no_place(name)
    target = gguf_name(name, name_map(text, facts), facts)
    b = pair.b.float()
    for change in changes_of(name, text, facts):
        b = change(b)
    for end, values in (("a", pair.a.float()), ("b", b * (pair.alpha / alpha))):
        yield Tensor(f"{target}.lora_{end}", tuple(values.shape), (_held(values.detach().cpu()),))


def _held(values: torch.Tensor) -> Weight:
    return Weight(tuple(values.shape), values.dtype, lambda start, stop: values[start:stop])


def _no_place(name: str) -> Refused:
    return Refused(Problem("export.gguf", f"llama.cpp's adapters have no place for {name}", MERGE))
