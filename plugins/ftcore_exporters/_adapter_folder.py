"""The adapter as PEFT writes it, and read back by PEFT."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ftcore import Checkpoint, Plan, Problem
from ftcore_exporters._read_back import careful


def problems(plan: Plan) -> list[Problem]:
    """There must be an adapter."""
    if plan.run.adapter is not None and plan.run.adapter.name == "full":
        return [Problem("export", "adapter=full trains no adapter that could be exported", "use +export=[safetensors]")]
    return []


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """`adapter_model.safetensors`, `adapter_config.json` and the tokenizer."""
    model: Any = checkpoint.model
    model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)


def read_back(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Load the base checkpoint again, the adapter over it with PEFT, and compare logits with the trained model's."""
    if reason := _other_base(checkpoint.plan):
        return {"verified": False, "consumer": "peft", "reason": reason}
    held = sum(parameter.nbytes for parameter in checkpoint.model.parameters())
    return careful(checkpoint, "peft", held, functools.partial(_read_back, checkpoint, folder))


def _read_back(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    import transformers
    from peft import PeftModel

    from ftcore import checkpoint as source
    from ftcore.read_back import KINDS
    from ftcore_exporters._read_back import compared

    plan, trained = checkpoint.plan, checkpoint.base()
    run = plan.run
    assert run.model is not None
    quantization = getattr(trained.config, "quantization_config", None)
    base = getattr(transformers, plan.family.auto_class).from_pretrained(
        source.locate(run.model, plan.family),
        revision=run.model.revision,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=trained.dtype,
        device_map={"": str(trained.device)},
        **({"quantization_config": quantization} if run.quantizer and quantization else {}),
        **plan.family.settings,
    )
    kind = KINDS.get(str(trained.dtype).removeprefix("torch."), "")
    return compared(checkpoint, PeftModel.from_pretrained(base, folder), folder, "peft", kind)


def _other_base(plan: Plan) -> str | None:
    """Why the base checkpoint alone is not what the adapter was trained over."""
    model, quantizer = plan.run.model, plan.run.quantizer
    assert model is not None
    if model.new_tokens:
        return "tokens were added to the base, which the checkpoint does not have"
    if model.rope_scaling or model.max_length:
        return "the base's RoPE was changed, which the checkpoint does not have"
    if quantizer is not None and quantizer.name not in ("bnb_nf4", "bnb_int8"):
        return f"the base was quantized by {quantizer.name} once it was loaded"
    return None
