"""transformers and PEFT as their documentation shows them, in a bare loop.

NF4 goes without `prepare_model_for_kbit_training`, whose float32 norms, embeddings and head would only slow it down.
"""

from __future__ import annotations

from typing import Any

from stepbench.loop import measure
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """Plain models."""
    return measure(work, adapted(work, base(work)))


def options(work: Work) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    import torch

    found: dict[str, Any] = {"dtype": getattr(torch, work.dtype)}
    if work.device == "cuda":
        found["device_map"] = {"": 0}
    if quantization := nf4(work):
        found["quantization_config"] = quantization
    return found


def nf4(work: Work) -> Any:
    """bitsandbytes' config where the work asks for NF4."""
    if work.quantizer == "none":
        return None
    if work.quantizer != "bnb_nf4":
        raise SystemExit(f"the peers know no quantizer '{work.quantizer}'")
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, work.dtype),
    )


def lora(work: Work) -> Any:
    """The adapter's config; None trains all weights."""
    from peft import LoraConfig

    if not work.rank:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=work.rank,
        lora_alpha=32,
        target_modules=work.targets,
        target_parameters=work.parameters or None,
    )


def base(work: Work) -> Any:
    """The model without its adapter."""
    import transformers

    model = getattr(transformers, work.auto_class).from_pretrained(work.folder, **options(work))
    model.config.use_cache = model.config.get_text_config().use_cache = False
    return model


def adapted(work: Work, model: Any) -> Any:
    """The model with its adapter, ready to train."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    if config := lora(work):
        model = get_peft_model(model, config)
    if work.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model
