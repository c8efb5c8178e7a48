"""LoRA: low-rank adapters over frozen weights, by PEFT (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import AdapterConfig, Plan, Problem, hookimpl, unsafe_weights
from ftcore.catalog import nearest
from ftcore.errors import Exit
from ftcore.parameter_groups import embeddings_frozen
from ftcore.parts import PARTS, parts_pattern
from ftcore.vocabulary import trained_rows
from ftcore_adapters import _loftq
from ftcore_adapters._heads import TASKS, inside, new_modules
from ftcore_adapters._saved import in_other_parts, of_another_task, of_other_shapes
from ftcore_adapters._whole import prepare, whole_and_quantized, whole_in_16_bits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EMBEDDINGS = ("lm_head", "embed_tokens")
WHOLE = (*EMBEDDINGS, "score", "classifier")
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
    loftq = "loftq"


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
    """Names of the adapted linear layers, and of parameters such as `experts.down_proj`; empty takes all that the
    family declares."""
    parts: list[str] = field(default_factory=list)
    """Of a model that reads images: `vision`, `language`, `attention`, `mlp`. Two choose its sides, two the kinds of
    layers; empty takes all."""
    variant: Variant = Variant.lora
    """`lora`, `rslora` (arXiv 2312.03732) or `dora` (arXiv 2402.09353)."""
    init: Init = Init.default
    """`default` (B = 0), `gaussian`, `pissa` (arXiv 2404.02948), `olora` (arXiv 2406.01775), or, over 4-bit weights,
    `loftq` (arXiv 2310.08659)."""
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
    if config.alpha <= 0:
        found.append(Problem("adapter.alpha", f"is {config.alpha:g}", "give a number above 0; twice the rank is usual"))
    if not 0 <= config.dropout < 1:
        found.append(Problem("adapter.dropout", f"is {config.dropout}", "give a number from 0 to below 1"))
    if config.path and not (Path(config.path) / "adapter_config.json").is_file():
        message = f"{config.path} holds no adapter_config.json"
        found.append(Problem("adapter.path", message, "give the folder of a saved adapter", Exit.MISSING_INPUT))
    elif config.path and (unsafe := unsafe_weights.problem("adapter.path", Path(config.path))):
        found.append(unsafe)
    elif config.path:
        found += _differences(config, Path(config.path) / "adapter_config.json", recorded=plan.run.run is not None)
        found += _untrained_rows(plan, Path(config.path) / "adapter_config.json")
        found += _of_other_runs(plan, Path(config.path) / "adapter_config.json")
    known = plan.family.lora_targets + plan.family.lora_parameters
    if strange := [t for t in config.targets if t not in known]:
        found.append(
            Problem(
                "adapter.targets", f"the family has no linear layer '{strange[0]}'", f"its layers: {', '.join(known)}"
            )
        )
    found += _on_parameters(config, _parameters(plan))
    found += _wrong_parts(plan, config.parts)
    modules = (*WHOLE, *plan.family.lora_targets)
    if strange := [m for m in config.modules_to_save if m.rpartition(".")[2] not in modules]:
        near = nearest(strange[0], modules)
        fix = f"did you mean '{near}'?" if near else f"known: {', '.join(modules)}"
        found.append(Problem("adapter.modules_to_save", f"the family has no module '{strange[0]}'", fix))
    found += _frozen_embeddings(plan)
    found += whole_and_quantized(plan)
    found += [] if found else whole_in_16_bits(plan)  # which asks the device
    if config.init in (Init.pissa, Init.olora) and plan.run.quantizer:
        found.append(
            Problem(
                "adapter.init",
                f"`{config.init.value}` needs 16-bit weights",
                "use adapter.init=default with a quantizer, or adapter.init=loftq over 4-bit weights",
            )
        )
    if config.init is Init.loftq and not config.path:
        found += _loftq.problems(plan)
    return found


def _frozen_embeddings(plan: Plan) -> Iterator[Problem]:
    """A rate for the embedding and the head, neither of which is trained."""
    config, trainer = plan.config(Config), plan.run.trainer
    if trainer is None or trainer.embedding_learning_rate is None:
        return
    assert plan.run.model is not None
    whole = {name.rpartition(".")[2] for name in config.modules_to_save}
    # What a saved adapter trains is known once it is loaded.
    if not (config.path or plan.run.model.new_tokens or whole & set(EMBEDDINGS)):
        yield embeddings_frozen()


def _modules(plan: Plan, parameters: list[str]) -> list[str] | str:
    """The names of the adapted linear layers; for a model that reads images, an expression of their paths."""
    config, vision = plan.config(Config), plan.family.vision
    names = [name for name in config.targets or plan.family.lora_targets if name not in parameters]
    return parts_pattern(vision, config.parts, names) if vision else names


def _wrong_parts(plan: Plan, parts: list[str]) -> Iterator[Problem]:
    """Parts that there are, and layers in them."""
    vision = plan.family.vision
    if parts and vision is None:
        assert plan.run.model is not None
        message = f"{plan.run.model.name} reads no images, so it has no parts to choose from"
        yield Problem("adapter.parts", message, "choose layers by name: adapter.targets")
    elif strange := [part for part in parts if part not in PARTS]:
        near = nearest(strange[0], PARTS)
        fix = f"did you mean '{near}'?" if near else f"known: {', '.join(PARTS)}"
        yield Problem("adapter.parts", f"there is no part '{strange[0]}'", fix)


def _parameters(plan: Plan) -> list[str]:
    """The parameters that get an adapter of their own, besides linear layers."""
    chosen = plan.config(Config).targets
    return [name for name in plan.family.lora_parameters if not chosen or name in chosen]


def _on_parameters(config: Config, parameters: list[str]) -> Iterator[Problem]:
    """What PEFT does not have for adapters on parameters: there, no input passes through A and B."""
    fix = f"leave it out, or give adapter.targets without {', '.join(parameters)}"
    for key, asked in (
        ("dropout", bool(config.dropout)),
        ("variant", config.variant is Variant.dora),
        ("init", config.init in (Init.pissa, Init.olora, Init.loftq)),
    ):
        if parameters and asked:
            value = getattr(config, key)
            message = f"{getattr(value, 'value', value)} is not possible on experts"
            yield Problem(f"adapter.{key}", message, fix)


def _differences(config: Config, file: Path, recorded: bool) -> Iterator[Problem]:
    """Settings that were asked for, but that the saved adapter has otherwise: loading it takes its own.

    :param recorded: The settings are those of the run that saved it. How A and B started is theirs, too, but not all of
        it is in what was saved: after LoftQ it is a plain adapter.
    """
    saved = _read(file)
    if saved is None:
        fix = "the adapter is damaged; give another folder"
        yield Problem("adapter.path", f"{file} is not JSON, or no object", fix, Exit.DATA)
        return
    new = not recorded
    variant = "dora" if saved.get("use_dora") else "rslora" if saved.get("use_rslora") else "lora"
    for key, asked, usual, kept in (
        ("r", config.r, Config.r, saved.get("r")),
        ("alpha", config.alpha, Config.alpha, saved.get("lora_alpha")),
        ("variant", config.variant.value, Config.variant.value, variant),
        ("init", Init.default.value if recorded else config.init.value, Config.init.value, _start(saved)),
        ("dropout", config.dropout, Config.dropout, saved.get("lora_dropout")),
        ("targets", sorted(config.targets) if new else [], [], _targets(saved)),
        ("modules_to_save", sorted(config.modules_to_save) if new else [], [], _names(saved.get("modules_to_save"))),
    ):
        if kept is not None and asked not in (usual, kept):
            message = f"is {asked}, but the adapter saved in {file.parent} has {kept}"
            what = {"r": "rank"}.get(key, key)
            yield Problem(f"adapter.{key}", message, f"a saved adapter keeps its {what}: leave adapter.{key} out")


def _untrained_rows(plan: Plan, file: Path) -> Iterator[Problem]:
    """New tokens that a saved adapter has no rows for: it would be trained on, and they would not."""
    assert plan.run.model is not None
    saved, tokens = _read(file), plan.run.model.new_tokens
    if saved is None or not tokens or plan.run.run is not None:
        return
    rows = saved.get("trainable_token_indices") or {}
    most = max(map(len, rows.values() if isinstance(rows, dict) else [rows]), default=0)
    whole = {name.rpartition(".")[2] for name in _names(saved.get("modules_to_save")) or ()}
    if most < len(tokens) and not whole & set(EMBEDDINGS):
        message = f"the adapter saved in {file.parent} trains {most} rows of tokens, and these are {len(tokens)}"
        fix = (
            "train them with a new adapter: on the same base, or on the merged model that +export=[safetensors] writes"
        )
        yield Problem("model.new_tokens", message, fix)


def _of_other_runs(plan: Plan, file: Path) -> Iterator[Problem]:
    """A saved adapter of another task, or of other parts than are asked for; that of the run itself is none."""
    if plan.run.run is None and (saved := _read(file)) is not None:
        yield from of_another_task(plan, saved, str(file.parent))
        yield from in_other_parts(plan, saved, _modules(plan, _parameters(plan)), str(file.parent))


def _read(file: Path) -> dict[str, Any] | None:
    """A saved adapter's settings; None where they are damaged."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return saved if isinstance(saved, dict) else None


def _names(saved: Any) -> list[str] | None:
    """In order; None where the adapter has a pattern, which names cannot be compared with."""
    return None if isinstance(saved, str) else sorted(saved or [])


def _targets(saved: dict[str, Any]) -> list[str] | None:
    """Linear layers and parameters that have an adapter."""
    layers = _names(saved.get("target_modules"))
    return None if layers is None else sorted([*layers, *(saved.get("target_parameters") or [])])


def _start(saved: dict[str, Any]) -> str:
    """How a saved adapter began."""
    kind = saved.get("init_lora_weights", True)
    return kind if isinstance(kind, str) else Init.default.value


@hookimpl
def ftcore_adapt_model(plan: Plan, model: PreTrainedModel) -> nn.Module:
    """A PEFT model around the base; A, B and the rows of new tokens stay in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    config = plan.config(Config)
    if config.path:
        with of_other_shapes(config.path):
            loaded: nn.Module = PeftModel.from_pretrained(model, config.path, is_trainable=True)
        prepare(loaded, plan)
        return loaded
    set_seed(plan.run.trainer.seed if plan.run.trainer else 0)
    parameters = _parameters(plan)
    rows = trained_rows(plan, model, [name.rpartition(".")[2] for name in config.modules_to_save])
    # LoftQ's start is set below: the saved adapter is a plain one, for PEFT would begin it again when it is loaded.
    init: Any = True if config.init in (Init.default, Init.loftq) else config.init.value
    task = TASKS.get(plan.family.auto_class, "CAUSAL_LM")
    new = new_modules(model, task)
    whole = [*config.modules_to_save, *(new if task == "SEQ_CLS" else ())]
    adapted: nn.Module = get_peft_model(
        model,
        LoraConfig(
            task_type=task,
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=_modules(plan, parameters),
            target_parameters=parameters or None,
            use_rslora=config.variant is Variant.rslora,
            use_dora=config.variant is Variant.dora,
            init_lora_weights=init,
            exclude_modules=inside([*new, *plan.family.frozen]),
            modules_to_save=whole or None,
            trainable_token_indices=rows or None,
        ),
    )
    prepare(adapted, plan)
    if config.init is Init.loftq:
        _loftq.start(adapted, plan)
    return adapted
