"""LoRA: low-rank adapters over frozen weights, by PEFT (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import AdapterConfig, Plan, Problem, hookimpl
from ftcore.catalog import nearest
from ftcore.errors import Exit

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

WHOLE = ("lm_head", "embed_tokens", "score", "classifier")
"""Modules besides the family's linear layers that are trained whole."""


class Variant(Enum):
    """Forms of LoRA."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Init(Enum):
    """How A and B start."""

    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    olora = "olora"


@dataclass
class Config(AdapterConfig):
    """LoRA's settings."""

    r: int = 16
    """Rank of the adapter matrices."""
    alpha: float = 32
    """The adapter's output is scaled by alpha / r (by alpha / sqrt(r) for rsLoRA)."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] = field(default_factory=list)
    """Names of the adapted linear layers; empty takes all that the family declares."""
    variant: Variant = Variant.lora
    """`lora`, `rslora` (arXiv 2312.03732) or `dora` (arXiv 2402.09353)."""
    init: Init = Init.default
    """`default` (B = 0), `gaussian`, `pissa` (arXiv 2404.02948) or `olora`."""
    path: str | None = None
    """Folder of a saved adapter to go on training."""
    modules_to_save: list[str] = field(default_factory=list)
    """Further modules that are trained whole, such as `lm_head`."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Rank and dropout in range; a saved adapter is there and fits; targets and modules that the family knows."""
    config = plan.config(Config)
    found = []
    if config.r < 1:
        found.append(Problem("adapter.r", f"is {config.r}", "give a rank of at least 1; 16 is usual"))
    if not 0 <= config.dropout < 1:
        found.append(Problem("adapter.dropout", f"is {config.dropout}", "give a number from 0 to below 1"))
    if config.path and not (Path(config.path) / "adapter_config.json").is_file():
        message = f"{config.path} holds no adapter_config.json"
        found.append(Problem("adapter.path", message, "give the folder of a saved adapter", Exit.MISSING_INPUT))
    elif config.path:
        found += _differences(config, Path(config.path) / "adapter_config.json")
    known = plan.family.lora_targets
    if strange := [t for t in config.targets if t not in known]:
        found.append(
            Problem(
                "adapter.targets", f"the family has no linear layer '{strange[0]}'", f"its layers: {', '.join(known)}"
            )
        )
    modules = (*WHOLE, *known)
    if strange := [m for m in config.modules_to_save if m.rpartition(".")[2] not in modules]:
        near = nearest(strange[0], modules)
        fix = f"did you mean '{near}'?" if near else f"known: {', '.join(modules)}"
        found.append(Problem("adapter.modules_to_save", f"the family has no module '{strange[0]}'", fix))
    if config.init in (Init.pissa, Init.olora) and plan.run.quantizer:
        found.append(
            Problem(
                "adapter.init",
                f"`{config.init.value}` needs 16-bit weights",
                "use adapter.init=default with a quantizer",
            )
        )
    return found


def _differences(config: Config, file: Path) -> Iterator[Problem]:
    """Settings that were asked for, but that the saved adapter has otherwise: loading it takes its own."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        fix = "the adapter is damaged; give another folder"
        yield Problem("adapter.path", f"{file} is not JSON, or no object", fix, Exit.DATA)
        return
    variant = "dora" if saved.get("use_dora") else "rslora" if saved.get("use_rslora") else "lora"
    for key, asked, usual, kept in (
        ("r", config.r, Config.r, saved.get("r")),
        ("alpha", config.alpha, Config.alpha, saved.get("lora_alpha")),
        ("variant", config.variant.value, Config.variant.value, variant),
    ):
        if kept is not None and asked not in (usual, kept):
            message = f"is {asked}, but the adapter saved in {file.parent} has {kept}"
            what = {"r": "rank"}.get(key, key)
            yield Problem(f"adapter.{key}", message, f"a saved adapter keeps its {what}: leave adapter.{key} out")


@hookimpl
def ftcore_adapt_model(plan: Plan, model: PreTrainedModel) -> nn.Module:
    """A PEFT model around the base; A and B stay in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    config = plan.config(Config)
    if config.path:
        return PeftModel.from_pretrained(model, config.path, is_trainable=True)
    set_seed(plan.run.trainer.seed if plan.run.trainer else 0)
    init: Any = True if config.init is Init.default else config.init.value
    adapted: nn.Module = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=config.targets or list(plan.family.lora_targets),
            use_rslora=config.variant is Variant.rslora,
            use_dora=config.variant is Variant.dora,
            init_lora_weights=init,
            modules_to_save=config.modules_to_save or None,
        ),
    )
    return adapted
