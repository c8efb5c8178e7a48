"""OLMo 2: a decoder with norms after attention and feed-forward, and a norm over all queries and all keys."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import ModelConfig, ModelFamily, Role, hookimpl

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The Tulu format of OLMo 2's instruct checkpoints."""


@dataclass
class Config(ModelConfig):
    """OLMo 2's settings."""

    id: str = "allenai/OLMo-2-0425-1B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Traits say where the maths departs from the plain form, so that no kernel that does not know them is used."""
    return ModelFamily(
        model_types=("olmo2",),
        roles=(
            Role("rms_norm", "Olmo2RMSNorm", frozenset({"weight_in_float32"})),
            Role("mlp", "Olmo2MLP"),
            Role("attention", "Olmo2Attention", frozenset({"qk_norm_over_all_heads"})),
        ),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={
            "vocab_size": 259,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
        chat_template=CHAT_TEMPLATE,
    )
