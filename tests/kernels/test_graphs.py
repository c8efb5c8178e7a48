"""Recorded layers do what launched ones do, to the last bit; needs a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import ftcore

DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU"),
]

FAMILIES = ("llama", "qwen3", "gemma3")


def load(family: str, graphs: str, *more: str) -> Any:
    """A tiny model in bfloat16 with the same weights each time, B not zero."""
    words = [f"+model={family}", "model.tiny=true", "model.dtype=bfloat16", f"graphs={graphs}", *more]
    model, _ = ftcore.load(words)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(values)
    return model.train()


def batch(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def recorded(model: Any) -> list[int]:
    """Recorded shapes of each layer."""
    layers = [module.ftcore_recompute for module in model.modules() if hasattr(module, "ftcore_recompute")]
    return [0 if layer.graphs is None else len(layer.graphs._records) for layer in layers]


def train(model: Any, shapes: list[tuple[int, int]], micro: int = 1) -> list[torch.Tensor]:
    """Every loss and every gradient of SGD steps over batches of these shapes."""
    found = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for step, (rows, length) in enumerate(shapes):
        for part in range(micro):
            ids = batch(10 * step + part, rows, length)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append(loss.detach().clone())
        found += [parameter.grad.clone() for parameter in trained]
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:  # a changed rate takes effect
            group["lr"] *= 0.9
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_replayed_equals_launched(family: str, micro: int, adapter: str) -> None:
    shapes = [(2, 16)] * 5 + [(2, 16), (3, 8)] * 5
    launched, replayed = load(family, "off", f"adapter={adapter}"), load(family, "auto", f"adapter={adapter}")
    expected, found = train(launched, shapes, micro), train(replayed, shapes, micro)
    assert set(recorded(launched)) == {0}
    assert set(recorded(replayed)) == {2}  # Gemma 3's windowed layers as well: a window is no dense mask
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))
    assert all(value.isfinite().all() for value in found)


def warm(model: Any) -> None:
    """Record batches of 2 x 16."""
    train(model, [(2, 16)] * 4)
    assert set(recorded(model)) == {1}


def grads(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def pair(family: str = "llama") -> tuple[Any, Any]:
    """A model that launches and one that has recorded, with the same weights."""
    launched, replayed = load(family, "off"), load(family, "auto")
    train(launched, [(2, 16)] * 4)
    warm(replayed)
    return launched, replayed


def both(models: tuple[Any, Any], work: Any) -> None:
    """The work leaves the same gradients on both."""
    expected, found = (work(model) or grads(model) for model in models)
    assert expected
    assert all(map(torch.equal, expected, found))


def test_two_forwards_before_a_backward() -> None:
    def work(model: Any) -> None:
        one, two = batch(1, 2, 16), batch(2, 2, 16)
        first, second = model(input_ids=one, labels=one).loss, model(input_ids=two, labels=two).loss
        (first + 3 * second).backward()

    both(pair(), work)


def test_a_forward_that_nobody_differentiates() -> None:
    def work(model: Any) -> None:
        one, two = batch(1, 2, 16), batch(2, 2, 16)
        model(input_ids=one, labels=one).loss.item()
        model(input_ids=two, labels=two).loss.backward()

    both(pair(), work)


def test_evaluation_in_between() -> None:
    def work(model: Any) -> None:
        one, two = batch(1, 2, 16), batch(2, 2, 16)
        loss = model(input_ids=one, labels=one).loss
        with torch.no_grad():
            model.eval()
            model(input_ids=two)
            model.train()
        loss.backward()

    both(pair(), work)


def test_an_adapter_that_is_off() -> None:
    models = pair()
    ids = batch(1, 2, 16)
    outputs = []
    for model in models:
        with model.disable_adapter():
            outputs.append(model(input_ids=ids, labels=ids).loss.detach())
        outputs.append(model(input_ids=ids, labels=ids).loss.detach())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_padded_batch_is_launched() -> None:
    def work(model: Any) -> None:
        ids, mask = batch(1, 2, 16), torch.ones(2, 16, dtype=torch.long, device=DEVICE)
        mask[1, 11:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    both(pair(), work)


def test_a_second_backward_is_refused() -> None:
    _, replayed = pair()
    ids = batch(1, 2, 16)
    hidden = replayed(input_ids=ids, labels=ids).loss
    hidden.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        hidden.backward()


def test_models_do_not_share_memory() -> None:
    first, second = load("llama", "auto"), load("llama", "auto")
    warm(first)
    warm(second)
    one, two = batch(1, 2, 16), batch(2, 2, 16)
    a, b = first(input_ids=one, labels=one).loss, second(input_ids=two, labels=two).loss
    (a + b).backward()
    expected = load("llama", "off")
    train(expected, [(2, 16)] * 4)
    expected(input_ids=one, labels=one).loss.backward()
    assert all(map(torch.equal, grads(expected), grads(first)))


def test_graphs_off_records_nothing() -> None:
    model = load("llama", "off")
    train(model, [(2, 16)] * 6)
    assert set(recorded(model)) == {0}
