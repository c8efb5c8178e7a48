"""The model card of an export: README.md, as the hub reads it.

https://huggingface.co/docs/hub/model-cards describes the fields in front.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ftcore import Plan, checkpoint
from ftcore_exporters._recorded import origin, recorded

HYPERPARAMETERS = (
    *("learning_rate", "epochs", "max_steps", "global_batch", "max_length", "optimizer", "schedule", "warmup"),
    *("weight_decay", "seed"),
)
ADAPTERS = ("r", "alpha", "dropout", "variant", "targets")
VARIABLES = {"AutoFeatureExtractor": "feature_extractor", "AutoProcessor": "processor", "AutoTokenizer": "tokenizer"}
FORMS = {"adapter": "a LoRA adapter (PEFT)", "gguf": "GGUF files for llama.cpp"}


def card(plan: Plan, what: str, source: Path, repo_id: str, license_id: str | None) -> str:
    """The card as text.

    :param what: the export that is pushed.
    :param source: its folder.
    :param license_id: by the hub's id; None says that it is unknown.
    """
    found = recorded(plan)
    lines = [*_front(plan, what, source, license_id), f"# {repo_id.rpartition('/')[2]}", ""]
    lines += [f"This is {FORMS.get(what, f'a merged model ({what})')}, fine-tuned from {_base_text(plan)} with ftcore."]
    lines += ["", *_training(found), *_metrics(plan), *_usage(plan, what, source, repo_id)]
    if license_id is None:
        lines += ["## Licence", "", "Not stated. That of the base model may apply.", ""]
    return "\n".join(lines)


def base_id(plan: Plan) -> str | None:
    """The base model's id on the hub; None for a local folder or random weights."""
    model = origin(plan)
    return model.id if not (model.path or model.tiny or model.shape) and model.id else None


def _base_text(plan: Plan) -> str:
    known = base_id(plan)
    if known:
        return f"[{known}](https://huggingface.co/{known})"
    model = origin(plan)
    return "random weights" if model.tiny or model.shape else f"a local {model.name} checkpoint"


def _front(plan: Plan, what: str, source: Path, license_id: str | None) -> list[str]:
    is_adapter = (source / "adapter_config.json").is_file()
    lines = ["---", f"license: {license_id or 'unknown'}"]
    if known := base_id(plan):
        relation = "adapter" if is_adapter else "finetune" if what == "safetensors" else "quantized"
        relation = "finetune" if not is_adapter and what in ("vllm", "sglang") else relation
        lines += [f"base_model: {known}", f"base_model_relation: {relation}"]
    lines.append(f"library_name: {'peft' if is_adapter else 'gguf' if what == 'gguf' else 'transformers'}")
    if plan.family.auto_class == "AutoModelForCausalLM":
        lines.append("pipeline_tag: text-generation")
    return [*lines, "tags:", "- ftcore", "---", ""]


def _training(found: Mapping[str, Any]) -> Iterator[str]:
    trainer, adapter, data = (found.get(kind) or {} for kind in ("trainer", "adapter", "data"))
    yield from ("## Training", "")
    rows = {"trainer": trainer.get("name"), "data format": data.get("name"), "shape of the rows": _shape(data)}
    rows |= {name: trainer.get(name) for name in HYPERPARAMETERS}
    rows |= {f"adapter {name}": adapter.get(name) for name in ("name", *ADAPTERS)}
    rows["quantizer"] = (found.get("quantizer") or {}).get("name")
    rows["ftcore"] = _version()
    yield from ("| | |", "|---|---|")
    for name, value in rows.items():
        if value not in (None, "", [], {}):
            yield f"| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |"
    yield ""


def _shape(data: Mapping[str, Any]) -> str | None:
    from ftcore import hooks as h
    from ftcore.catalog import installed
    from ftcore.config import RunConfig
    from ftcore.manager import Hooks

    name = data.get("name")
    if not name or name not in installed().names("data"):
        return None
    option = installed().find("data", str(name))
    hooks = Hooks.for_run(RunConfig(), installed(), [option.load()])
    form = hooks.maybe(h.ftcore_data_format, config=option.config_class()(name=option.name))
    return form.shape if form is not None else None


def _version() -> str:
    try:
        return metadata.version("ftcore")
    except metadata.PackageNotFoundError:
        return "unknown"


def _metrics(plan: Plan) -> Iterator[str]:
    """The last of what was measured."""
    file = Path(plan.run.run or plan.output_dir) / "metrics.jsonl"
    last: dict[str, float] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            last |= {k: v for k, v in found.items() if isinstance(v, (int, float)) and k.startswith(("loss", "eval_"))}
    except (OSError, ValueError):
        return
    timing = ("runtime", "per_second")
    kept = {name: value for name, value in last.items() if not name.endswith(timing)}
    if kept:
        yield from ("## Measured", "", "| | |", "|---|---|")
        yield from (f"| {name} | {value:.4g} |" for name, value in kept.items())
        yield ""


def _usage(plan: Plan, what: str, source: Path, repo_id: str) -> Iterator[str]:
    yield from ("## Use", "")
    is_adapter = (source / "adapter_config.json").is_file()
    if (source / "SERVE.md").is_file():
        yield "`SERVE.md` has the command that serves it."
        yield ""
    elif what == "gguf":
        yield from ("```sh", f"llama-server -hf {repo_id}", "```", "")
    if is_adapter or (source / "config.json").is_file():
        yield from ("```python", *_loading(plan, source, repo_id, is_adapter), "```", "")


def _loading(plan: Plan, source: Path, repo_id: str, is_adapter: bool) -> Iterator[str]:
    """Python that loads the model by the class that was trained, and what makes its inputs."""
    auto = plan.family.auto_class
    inputs = ["AutoTokenizer"]
    if (source / "preprocessor_config.json").is_file():
        # An adapter's folder has no config that says which processor hears: its two parts are loaded one by one.
        apart = is_adapter and plan.family.vision is None
        inputs = ["AutoFeatureExtractor", "AutoTokenizer"] if apart else ["AutoProcessor"]
    if is_adapter and auto == "AutoModelForCausalLM":
        yield "from peft import AutoPeftModelForCausalLM"
        yield f"from transformers import {', '.join(inputs)}"
        yield from ("", f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")')
    elif is_adapter:
        yield "from peft import PeftModel"
        yield f"from transformers import {', '.join(sorted([auto, *inputs]))}"
        yield from ("", f'base = {auto}.from_pretrained("{_base_name(plan)}"{_labels(plan)})')
        yield f'model = PeftModel.from_pretrained(base, "{repo_id}")'
    else:
        yield f"from transformers import {', '.join(sorted([auto, *inputs]))}"
        yield from ("", f'model = {auto}.from_pretrained("{repo_id}")')
    for name in inputs:
        yield f'{VARIABLES[name]} = {name}.from_pretrained("{repo_id}")'


def _base_name(plan: Plan) -> str:
    """The base as the pushed `adapter_config.json` names it: no folder of this machine."""
    model = origin(plan)
    return base_id(plan) or Path(checkpoint.locate(model, plan.family)).name


def _labels(plan: Plan) -> str:
    """How many outputs the head has, which the base does not tell."""
    settings = plan.family.settings
    count = settings.get("num_labels") or len(settings.get("id2label") or ())
    return f", num_labels={count}" if count else ""
