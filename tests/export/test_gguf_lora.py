"""LoRA adapters as GGUF in real llama.cpp: over the base's own file they give the merged model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_gguf_architectures import EXPERTS, GEMMA3, exported, folder_of

from ftcore import Checkpoint
from ftcore.errors import Refused
from ftcore.llama_cpp import LlamaCpp
from ftcore.testing import runs
from ftcore_exporters.gguf.lora import lora_problems, write_lora

IDS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
CASES = {
    "llama": ("llama", {}, []),
    "rslora": ("llama", {}, ["adapter.variant=rslora"]),
    "smollm2": ("smollm2", {}, []),
    "mistral": ("mistral", {"sliding_window": None}, []),
    "qwen2": ("qwen2", {"use_sliding_window": False}, []),
    "qwen3": ("qwen3", {}, []),
    "gemma": ("gemma", {}, []),
    "gemma2": ("gemma2", {}, []),
    "gemma3": ("gemma3", GEMMA3, []),
    "phi3": ("phi3", {"sliding_window": None}, []),
    "lfm2": ("lfm2", {}, []),
    "gemma3_vision-language": ("gemma3_vision", {"text_config": GEMMA3}, ["adapter.parts=[language]"]),
    "qwen3_moe-attention": ("qwen3_moe", EXPERTS, ["adapter.targets=[q_proj,k_proj,v_proj,o_proj]"]),
}
FEW = ("llama", "rslora", "phi3", "qwen3_moe-attention")


def trained(name: str, folder: Path, run: Path, *overrides: str) -> Checkpoint:
    """A tiny checkpoint with an adapter that does something."""
    loaded = runs.loaded(
        [f"+model={name}", f"model.path='{folder}'", "model.dtype=float32", f"output_dir='{run}'", *overrides]
    )
    runs.shake(loaded.model, trainable_only=True)
    return Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=loaded.plan)


def logits(model: Any) -> torch.Tensor:
    """transformers' logits of one row, `[length, vocab]`."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits[0].float()
    return found


def compared(checkpoint: Checkpoint, name: str, folder: Path, tmp: Path) -> tuple[float, float]:
    """How far llama.cpp is from transformers with the adapter, and how much the adapter changes."""
    write_lora(checkpoint, tmp / "adapter.gguf")
    [base] = exported(name, folder, tmp / "base", "export.gguf.types=[f32]")
    wanted = logits(checkpoint.model)
    with checkpoint.model.disable_adapter():  # type: ignore[operator]
        change = (wanted - logits(checkpoint.model)).abs().max()
    with LlamaCpp(base.path, lora=tmp / "adapter.gguf") as consumer:
        found = consumer.logits(IDS)
    return float((found - wanted).abs().max()), float(change)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FEW else pytest.mark.slow) for case in CASES])
def test_over_the_base_it_is_the_merged_model(case: str, tmp_path: Path) -> None:
    """Within 1e-3, where the adapter itself changes logits by more than a tenth."""
    name, changes, overrides = CASES[case]
    folder = folder_of(name, changes, tmp_path / "model")
    apart, change = compared(trained(name, folder, tmp_path / "run", *overrides), name, folder, tmp_path)
    print(f"{case}: {apart:.2e} apart, the adapter changes logits by {change:.2f}")
    assert change > 0.1
    assert apart <= 1e-3


def test_layers_with_a_rank_and_alpha_of_their_own(tmp_path: Path) -> None:
    """What one alpha for all does not say goes into B."""
    from peft import LoraConfig, get_peft_model

    folder = folder_of("llama", {}, tmp_path / "model")
    checkpoint = trained("llama", folder, tmp_path / "run")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 6},
        alpha_pattern={"q_proj": 3},
    )
    model = get_peft_model(checkpoint.model.unload(), config)  # type: ignore[operator,arg-type]
    runs.shake(model, trainable_only=True)
    apart, change = compared(
        Checkpoint(model=model, tokenizer=checkpoint.tokenizer, plan=checkpoint.plan), "llama", folder, tmp_path
    )
    assert change > 0.1
    assert apart <= 1e-3


def test_metadata_is_that_of_an_adapter(tmp_path: Path) -> None:
    """As llama.cpp asks for it: type, alpha, architecture; A and B of each layer."""
    checkpoint = runs.loaded([*runs.TINY, "adapter.r=4", "adapter.alpha=12", f"output_dir='{tmp_path / 'run'}'"])
    made = Checkpoint(model=checkpoint.model, tokenizer=checkpoint.tokenizer, plan=checkpoint.plan)
    write_lora(made, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    wanted = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
    }
    assert {key: reader.fields[key].contents() for key in wanted} == wanted
    shapes = {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"][1] == shapes["blk.0.ffn_down.weight.lora_b"][0] == 4
    assert len(shapes) == 2 * 7 * made.base().config.num_hidden_layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["+model=llama", "adapter=full"], "trains no LoRA"),
        (["+model=llama", "adapter.variant=dora"], "DoRA"),
        (["+model=llama", "adapter.modules_to_save=[lm_head]"], "lm_head is trained whole"),
        (["+model=llama", "adapter.init=pissa"], "changes the base's weights"),
        (["+model=llama", "model.new_tokens=['<new>']"], "new tokens"),
    ],
)
def test_plans_whose_adapter_is_refused(overrides: list[str], reason: str) -> None:
    """Told before any weight is read."""
    _, plan = runs.prepared([*overrides, "model.tiny=true", "model.dtype=float32"])
    [problem] = lora_problems(plan)
    assert reason in problem.message


def test_adapted_experts_are_refused(tmp_path: Path) -> None:
    """They are one parameter with all experts; nothing is left behind."""
    loaded = runs.loaded(
        ["+model=qwen3_moe", "model.tiny=true", "model.dtype=float32", f"output_dir='{tmp_path / 'r'}'"]
    )
    with pytest.raises(Refused, match="experts are adapted"):
        write_lora(Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=loaded.plan), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
