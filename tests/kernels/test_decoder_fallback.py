"""A layer that trains as transformers' own says so."""

from __future__ import annotations

import pytest
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


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *(("llama", place) for place in ("self_attn", "mlp", "self_attn.q_proj", "self_attn.q_proj.base_layer")),
        ("llama", "input_layernorm"),
        ("qwen3", "self_attn.k_norm"),
        ("gemma2", "pre_feedforward_layernorm"),
    ],
)
def test_hooks_inside_a_layer_are_called(family: str, place: str, capsys) -> None:
    """As somebody who probes or steers wants it; transformers' own forward calls the modules, the kernel does not."""
    uncovered.say.cache_clear()
    model, _ = ftcore.load([f"+model={family}", "model.tiny=true", "model.dtype=float32"])
    ids, calls = torch.arange(12).view(1, 12).to(model.device), list[str]()
    layer = model.get_base_model().model.layers[1]
    plain = model.train()(input_ids=ids, labels=ids).loss
    handle = layer.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
    hooked = model(input_ids=ids, labels=ids).loss
    assert calls == [place]
    assert torch.allclose(plain, hooked, rtol=1e-5)
    assert "a module inside a layer has hooks" in capsys.readouterr().out
    handle.remove()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)
    assert calls == [place]
