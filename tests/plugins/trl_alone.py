"""Untouched TRL in a process of its own: loss and gradients of each case of `test_preference_parity.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def trainer_of(case: dict[str, Any], folder: Path) -> Any:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto = AutoModelForSequenceClassification if case["trainer"] == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(case["model"], dtype=torch.float32)
    if case["adapter"]:
        model = PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)
    trainer_class, config_class = classes(case["trainer"])
    arguments = {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    return trainer_class(
        model=model,
        args=config_class(**arguments, **case["arguments"]),
        train_dataset=Dataset.from_list(case["rows"]),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
    )


def classes(name: str) -> tuple[Any, Any]:
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "simpo": (CPOTrainer, CPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[name]


def loss_and_gradients(trainer: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    trainer.model.train()
    rows = trainer.train_dataset
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(list(rows))))
    loss.backward()
    named = trainer.model.named_parameters()
    gradients = {name: p.grad for name, p in named if name in weights and p.grad is not None}
    return {"loss": loss.detach(), **gradients}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert "ftcore" not in sys.modules
    for file in sorted(folder.glob("*.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        answer = loss_and_gradients(trainer_of(case, folder), torch.load(case["weights"]))
        torch.save(answer, file.with_suffix(".trl"))
