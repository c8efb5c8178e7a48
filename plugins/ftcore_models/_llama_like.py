"""What the families with Llama's layer plan share: names of projections, and a tiny size."""

from __future__ import annotations

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TINY = {
    "vocab_size": 259,  # the byte-level tokenizer's
    "hidden_size": 64,
    "intermediate_size": 192,  # bitsandbytes packs 4-bit weights for CPUs in whole blocks of 64 inputs
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
