"""A layer that trains as transformers' own says so."""

from __future__ import annotations

import torch
from torch import nn

import ftcore
from ftcore_kernels.layers import uncovered


def test_a_fallback_in_training_is_said_once(capsys) -> None:
    uncovered.say.cache_clear()
    model, _ = ftcore.load(["+model=llama", "model.tiny=true"])
    ids = torch.arange(12).view(1, 12).to(model.device)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert "transformers' own" not in capsys.readouterr().out
    for module in model.modules():
        if "lora_dropout" in module._modules:
            module.lora_dropout["default"] = nn.Dropout(0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    said = [line for line in capsys.readouterr().out.splitlines() if "transformers' own" in line]
    assert said == ["decoder layers run as transformers' own in training: LoRA has dropout"]
