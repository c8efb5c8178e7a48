"""Every architecture as float32 GGUF in real llama.cpp: the same logits as transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ftcore import pipeline, vision
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.checkpoint import locate
from ftcore.llama_cpp import LlamaCpp
from ftcore.specs import Artifact
from ftcore.testing import runs

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
}
LONG_PHI3 = {
    "sliding_window": None,
    "rope_parameters": LONG,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
}
LENGTHS = {"phi3-short-factors": (40, 256), "phi3-long-factors": (270, 512)}
"""Tokens, and the context that llama.cpp is opened with, by which it chooses the factors."""
GEMMA3 = {
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
}
TWO_THETAS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
}
EXPERTS = {"mlp_only_layers": [], "num_experts": 12, "moe_intermediate_size": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "smollm2": ("smollm2", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2-tied": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3}, "max_position_embeddings": 256}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", GEMMA3),
    "gemma3-two-thetas": ("gemma3", GEMMA3 | {"rope_parameters": TWO_THETAS}),
    "gemma3_vision": ("gemma3_vision", {"text_config": GEMMA3}),
    # llama.cpp b11549 reads this architecture's epsilon and uses 0.
    "qwen2_vl": ("qwen2_vl", {"text_config": {"rms_norm_eps": 1e-10}}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-long-factors": ("phi3", LONG_PHI3),
    "phi3-short-factors": ("phi3", LONG_PHI3),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "lfm2-rounded": ("lfm2", {"block_auto_adjust_ff_dim": True}),
}


def folder_of(name: str, changes: dict[str, Any], folder: Path) -> Path:
    """A tiny checkpoint of a family, its config changed, its weights away from where they start."""
    family = runs.prepared([f"+model={name}", "model.tiny=true", "model.dtype=float32"])[1].family
    arguments = {**family.tiny}
    for key, value in changes.items():
        arguments[key] = {**arguments[key], **value} if key == "text_config" else value
    config = transformers.AutoConfig.for_model(family.model_types[0], **arguments)
    tokenizer = byte_tokenizer(family.chat_template, family.tokens)
    torch.manual_seed(0)
    model = getattr(transformers, family.auto_class).from_config(config, dtype=torch.float32)
    runs.shake(model)
    for path, parameter in model.named_parameters():
        if path.endswith("post_feedforward_layernorm.weight"):
            # A quiet MLP: seven layers would amplify what llama.cpp's GELU rounds off, by a table of float16 numbers.
            parameter.data -= 0.8
    model.save_pretrained(folder)
    if family.vision:
        vision.attach_tiny(tokenizer, family.vision)
    tokenizer.save_pretrained(folder)
    return folder


def exported(name: str, folder: Path, run: Path, *overrides: str) -> list[Artifact]:
    """A checkpoint folder as GGUF, by the plugin."""
    wanted = [f"+model={name}", f"model.path='{folder}'", "model.dtype=float32", "adapter=full", "+export=[gguf]"]
    hooks, plan = runs.prepared([*wanted, "export.gguf.verify=false", f"output_dir='{run}'", *overrides])
    return pipeline.export_stored(hooks, plan)


class HalfGelu(torch.nn.Module):
    """GELU as llama.cpp's CPU code has it: by a table of float16 numbers (`GGML_GELU_FP16`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


def reference(name: str, folder: Path, ids: list[int], exact: bool = True) -> torch.Tensor:
    """transformers' logits of one row, `[length, vocab]`; unless `exact`, with llama.cpp's coarser GELU."""
    family = runs.prepared([f"+model={name}", "model.tiny=true", "model.dtype=float32"])[1].family
    model = getattr(transformers, family.auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), transformers.activations.GELUTanh) and not exact:
            module.act_fn = HalfGelu()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if "-" in case else ()) for case in CASES])
def test_float32_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    """Within 1e-4; of Gemma so against transformers with llama.cpp's GELU, and within 1e-3 with its own."""
    name, changes = CASES[case]
    folder = folder_of(name, changes, tmp_path / "model")
    artifact, *_ = exported(name, folder, tmp_path / "run", "export.gguf.types=[f32]")
    length, context = LENGTHS.get(case, (24, 2048))
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    wanted = reference(name, folder, ids, exact=False)
    with LlamaCpp(artifact.path, context=context) as consumer:
        found = consumer.logits(ids)
    assert found.shape == wanted.shape
    assert wanted.std() > 0.1  # logits that say something
    assert (found - wanted).abs().max() <= 1e-4
    assert (found - reference(name, folder, ids)).abs().max() <= 1e-3


@pytest.mark.slow
def test_smollm2_is_the_same_model_in_llama_cpp(tmp_path: Path) -> None:
    """Real weights, over 200 positions: float32 within 1e-4 of float64, and always the same best token.

    Of q8_0 the mean KL divergence was 5.6e-3, of which 1.7e-3 come from the weights and the rest from activations,
    which llama.cpp rounds to q8_0 as well; of q4_k_m, mostly Q5_0 as its rows are 576 wide, 0.1.
    """
    words = ["+model=smollm2", "model.dtype=float32", "adapter=full", "+export=[gguf]", "export.gguf.verify=false"]
    hooks, plan = runs.prepared(
        [*words, "export.gguf.types=[f32,q8_0,q4_k_m]", "data=messages", f"output_dir='{tmp_path}'"]
    )
    artifacts = pipeline.export_stored(hooks, plan)
    assert plan.run.model is not None and plan.format is not None
    folder = locate(plan.run.model, plan.family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = Path(plan.format.sample).read_text(encoding="utf-8").splitlines()
    text = "".join(tokenizer.apply_chat_template(json.loads(row)["messages"], tokenize=False) for row in rows[:8])
    ids = tokenizer(text)["input_ids"][:200]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].float()
    for artifact, most in zip(artifacts, (1e-6, 2e-2, 0.3), strict=True):
        with LlamaCpp(artifact.path) as consumer:
            found = consumer.logits(ids)
        kl = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True)
        assert kl * found.shape[-1] <= most, artifact.path.name
        if artifact is artifacts[0]:
            assert (found - wanted).abs().max() <= 1e-4
            assert torch.equal(found.argmax(-1), wanted.argmax(-1))
