"""A mask that the collator knows is handed past transformers: the same loss and gradients, no look at the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from ftcore.testing import maths, runs
from ftcore_kernels.layers.decoder.attention import handed, taken
from ftcore_kernels.layers.decoder.attention.mask import Mask

LENGTHS = (7, 1, 12, 4)
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "phi3", "qwen3_moe")
SHORT_WINDOWS = ("mistral", "gemma2", "phi3")
"""Their tiny models have windows that are shorter than the rows, which are left to transformers."""


def model_of(family: str) -> Any:
    model = runs.loaded([f"+model={family}", "model.tiny=true", "model.dtype=float32", "kernels=[reference]"]).model
    runs.shake(model)
    return model


def packed() -> tuple[dict[str, torch.Tensor], np.ndarray]:
    drawn = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (1, sum(LENGTHS)), generator=drawn)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}, (
        positions == 0
    ).numpy()


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How often transformers looks at the positions."""
    from transformers import masking_utils

    calls, real = [], masking_utils.find_packed_sequence_indices

    def look(positions: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return real(positions)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    return calls


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    inputs = {n: i.to(model.device) if isinstance(i, torch.Tensor) else i for n, i in inputs.items()}
    loss = model(**inputs, fused_loss=True).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("own", [False, True], ids=["ours", "a layer of transformers'"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_say_where_they_begin(family, own, asked) -> None:
    model, (inputs, begins) = model_of(family), packed()
    if own:  # dropout on LoRA's input, of no effect, which the manual layer has not
        for module in model.modules():
            if "lora_dropout" in module._modules:
                module.lora_dropout["default"] = nn.Dropout(1e-12)
    loss, gradients = step(model, **inputs)
    assert asked
    asked.clear()
    same, also = step(model, **inputs, begins=begins)
    assert bool(asked) == (family in SHORT_WINDOWS)
    assert maths.apart(same, loss) <= 1e-6
    assert also.keys() == gradients.keys()
    assert max(maths.apart(also[name], gradients[name]) for name in gradients) <= 1e-5
    whole, _ = step(model, **{**inputs, "position_ids": None})
    assert maths.apart(whole, loss) > 1e-3, "one document or four makes no difference to this model"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_without_positions_are_documents(family, asked) -> None:
    model, (inputs, _) = model_of(family), packed()
    inputs["position_ids"] = torch.arange(sum(LENGTHS))[None]
    loss, gradients = step(model, **inputs)
    assert asked
    asked.clear()
    same, also = step(model, input_ids=inputs["input_ids"], labels=inputs["labels"])
    assert maths.apart(same, loss) <= 1e-6
    assert max(maths.apart(also[name], gradients[name]) for name in gradients) <= 1e-5
    assert bool(asked) == (family == "gemma3")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_dense_form_is_transformers_s(name, documents) -> None:
    model, (inputs, begins) = model_of("llama"), packed()
    backbone, config = model.get_base_model().model, model.get_base_model().config
    config._attn_implementation = f"ftcore_{name}"
    given = {"input_ids": inputs["input_ids"]}
    mask = taken(handed(backbone, given, begins if documents else None)["attention_mask"])
    config._attn_implementation = name
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, sum(LENGTHS), config.hidden_size),
        attention_mask=None,
        past_key_values=None,
        position_ids=inputs["position_ids"] if documents else None,
    )
    ours = mask.dense_on(torch.device("cpu"))
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        torch.testing.assert_close(ours, theirs)


def test_only_attention_of_ours_takes_it() -> None:
    model, (inputs, begins) = model_of("llama"), packed()
    backbone = model.get_base_model().model
    mask = handed(backbone, {"input_ids": inputs["input_ids"]}, begins)["attention_mask"]
    assert mask.shape == (1, 1, sum(LENGTHS), sum(LENGTHS))
    assert isinstance(taken(mask), Mask)
    assert taken(mask.to("meta")) is taken(mask)
    with pytest.raises(NotImplementedError, match="only described"):
        mask + 1
    dense = torch.ones(1, 1, 2, 2)
    assert taken(dense) is dense


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        ({"_attn_implementation": "sdpa"}, {}),
        ({"is_causal": False}, {}),
        ({"use_bidirectional_attention": True}, {}),
        ({"layer_types": ["full_attention", "conv"]}, {}),
        ({"layer_types": None, "sliding_window": sum(LENGTHS) - 1}, {}),
        ({"attention_chunk_size": sum(LENGTHS) - 1}, {}),
        ({}, {"attention_mask": torch.ones(1, sum(LENGTHS))}),
        ({}, {"position_ids": torch.arange(sum(LENGTHS))[None]}),
        ({}, {"past_key_values": object()}),
        ({}, {"token_type_ids": torch.zeros(1, sum(LENGTHS))}),
    ],
)
def test_whatever_else_may_be_meant_is_left_to_transformers(config, inputs) -> None:
    backbone = model_of("llama").get_base_model().model
    given = {"input_ids": packed()[0]["input_ids"]}
    assert "attention_mask" in handed(backbone, given)
    for name, value in config.items():
        object.__setattr__(backbone.config, name, value)
    given |= inputs
    assert handed(backbone, given) is given
