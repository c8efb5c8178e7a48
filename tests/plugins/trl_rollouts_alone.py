"""Untouched TRL in a process of its own: losses and gradients of the cases of `test_reinforcement_parity.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def trainer_of(case: dict[str, Any], folder: Path) -> Any:
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, case["adapter"], is_trainable=True)
    name = case["trainer"]
    arguments = {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    return getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=getattr(trl, f"{name}Config")(**arguments, **case["arguments"]),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
    )


def loss_and_gradients(trainer: Any, weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    gradients = {name: p.grad for name, p in named if name in weights and p.grad is not None}
    return {"loss": loss.detach(), **gradients}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert "ftcore" not in sys.modules
    for file in sorted(folder.glob("*.case")):
        case = torch.load(file)
        answer = loss_and_gradients(trainer_of(case, folder), case["weights"], case["inputs"])
        torch.save(answer, file.with_suffix(".trl"))
