"""Unsloth by its own API, offline, on the same folder.

The byte-level tokenizer that ftcore puts into the folder suits it: its chat template has an `add_generation_prompt`
block, and its pad token differs from its end token.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from stepbench.loop import measure
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """LoRA over 16-bit or 4-bit weights, or all weights."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # it writes unsloth_compiled_cache/ where it runs
        import unsloth  # before transformers and peft, which it patches  # noqa: F401

        result = measure(work, load(work))
        os.chdir("/")
    return result


def load(work: Work) -> Any:
    """Its gradient checkpointing where the peers recompute, none where they do not."""
    import torch
    from unsloth import FastLanguageModel

    if work.quantizer not in ("none", "bnb_nf4"):
        raise SystemExit(f"the peers know no quantizer '{work.quantizer}'")
    recompute = "unsloth" if work.recompute else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=work.folder,
        max_seq_length=work.length,
        dtype=torch.bfloat16,
        load_in_4bit=work.quantizer == "bnb_nf4",
        full_finetuning=not work.rank,
        use_gradient_checkpointing=recompute,
        local_files_only=True,
    )
    if work.rank:
        model = FastLanguageModel.get_peft_model(
            model,
            r=work.rank,
            target_modules=work.targets,
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=recompute,
            random_state=0,
        )
    return model
