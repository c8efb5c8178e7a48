"""The whole-layer kernel in every family beyond Llama and Qwen3, against plain transformers of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
import torch
import transformers

from ftcore.testing import maths, runs

OPS = {
    "gemma": {"rms_norm", "mlp", "attention", "lm_head"},
    "gemma2": {"rms_norm", "mlp", "attention", "lm_head"},
    "gemma3": {"rms_norm", "mlp", "attention", "lm_head"},
    "mistral": {"rms_norm", "mlp", "attention", "lm_head"},
    "phi3": {"rms_norm", "lm_head"},
    "qwen2": {"rms_norm", "mlp", "attention", "lm_head"},
}
FAMILIES = tuple(OPS)
WINDOWED = tuple(name for name in FAMILIES if name != "gemma")
PARAMETERS = {
    ("gemma", "gemma-2b"): 2_506_172_416,
    ("gemma", "gemma-7b"): 8_537_680_896,
    ("gemma2", "gemma2-2b"): 2_614_341_888,
    ("gemma3", "gemma3-1b"): 999_885_952,
    ("gemma3", "gemma3-270m"): 268_098_176,
    ("gpt_oss", "gpt-oss-20b"): 20_914_757_184,
    ("lfm2", "lfm2-1.2b"): 1_170_340_608,
    ("lfm2", "lfm2-350m"): 354_483_968,
    ("mistral", "mistral-1.1b-cut"): 1_140_887_552,
    ("mistral", "mistral-7b-v0.3"): 7_248_023_552,
    ("mixtral", "mixtral-8x7b"): 46_702_792_704,
    ("phi3", "phi3-mini-4k"): 3_821_079_552,
    ("phi3", "phi4-14b"): 14_659_507_200,
    ("qwen2", "qwen2.5-0.5b"): 494_032_768,
    ("qwen2", "qwen2.5-1.5b"): 1_543_714_304,
    ("qwen2", "qwen2.5-7b"): 7_615_616_512,
    ("qwen3", "qwen3-0.6b"): 596_049_920,
    ("qwen3", "qwen3-1.7b"): 1_720_574_976,
    ("qwen3_moe", "qwen3-30b-a3b"): 30_532_122_624,
    ("qwen3_moe", "qwen3-moe-1.3b-cut"): 1_302_088_704,
    ("qwen3_vl", "qwen3-vl-2b"): 2_127_532_032,
}
"""Of the published checkpoints, and of what is left of them in a cut one."""
ADAPTERS = {
    "lora": ("adapter=lora",),
    "wide": ("adapter=lora", "adapter.r=80"),  # ranks that no kernel adds, but a product
    "full": ("adapter=full",),
}
LENGTH = 19
TOLERANCE = 2e-5


def tiny(family: str) -> tuple[str, ...]:
    return (f"+model={family}", "model.tiny=true", "model.dtype=float32")


def batch(padded: bool) -> dict[str, torch.Tensor]:
    """Three rows of bytes; the start of each is not trained, nor is padding on the right."""
    ids = torch.randint(0, 256, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :5] = -100
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, -7:] = mask[2, -2:] = 0
    return {"input_ids": ids, "labels": labels.where(mask == 1, -100), "attention_mask": mask}


def pair(*words: str, kernel_set: str) -> tuple[Any, Any]:
    """A patched model and a plain one with equal weights; no norm is at its start, no adapter at zero."""
    maths.needs_triton(kernel_set)
    loaded = runs.loaded([*words, f"kernels=[{kernel_set}]"])
    model, plain = loaded.model, runs.loaded([*words, "kernels=[]"]).model
    claimed = loaded.patches.counts()
    assert claimed["decoder_layer", f"{kernel_set}.decoder_layer"] == model.config.num_hidden_layers
    assert {role for role, _ in claimed} == {"decoder_layer", "rms_norm", "lm_head"}
    runs.shake(model)
    weights = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        weights.pop(name).data.copy_(weight.data)
    assert not weights
    return model, plain


def recompute(model: Any, policy: int) -> None:
    layers = [module for module in model.modules() if hasattr(module, "ftcore_recompute")]
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        layer.ftcore_recompute.choose = lambda rows, length: policy


def assert_same(model: Any, plain: Any, inputs: dict[str, torch.Tensor], policies: Sequence[int] = range(5)) -> None:
    """The loss and every gradient, with every policy; the policies differ in no bit."""
    loss, gradients = maths.loss_and_gradients(plain, inputs)
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    first: dict[str, torch.Tensor] | None = None
    for policy in policies:
        recompute(model, policy)
        our_loss, ours = maths.loss_and_gradients(model, inputs)
        assert maths.apart(our_loss, loss) <= TOLERANCE
        assert ours.keys() == gradients.keys()
        errors = {name: maths.apart(ours[name], gradients[name]) for name in gradients}
        assert not {name: error for name, error in errors.items() if not error <= TOLERANCE}
        first = first or ours
        assert [name for name in ours if not torch.equal(ours[name], first[name])] == []


@pytest.fixture
def no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that hands a call to the family's own forward fails: equal numbers would say nothing."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the call went to the family's own forward")

    monkeypatch.setattr("ftcore_kernels.layers.decoder._own", refuse)


@pytest.mark.few
@pytest.mark.usefixtures("no_way_out")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_loss_and_gradients(family: str, adapter: str) -> None:
    model, plain = pair(*tiny(family), *ADAPTERS[adapter], kernel_set="reference")
    assert family not in WINDOWED or model.config.sliding_window < LENGTH
    for padded in (False, True):
        assert_same(model, plain, batch(padded))


@pytest.mark.usefixtures("no_way_out")
@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "phi3" else pytest.mark.slow) for name in FAMILIES]
)
def test_layers_in_triton_keep_loss_and_gradients(family: str, adapter: str) -> None:
    model, plain = pair(*tiny(family), *ADAPTERS[adapter], kernel_set="triton")
    assert_same(model, plain, batch(padded=True), policies=(0, 4))  # the interpreter is slow


@pytest.mark.usefixtures("no_way_out")
@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen2"])
def test_layers_read_nf4_weights(family: str) -> None:
    model, plain = pair(*tiny(family), "+quantizer=bnb_nf4", kernel_set="reference")
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    for padded in (False, True):
        assert_same(model, plain, batch(padded))


@pytest.mark.parametrize("kernel_set", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_ops_take_the_roles_that_they_compute(family: str, kernel_set: str) -> None:
    """Where the whole layer is not the manual one, its parts are patched as far as an op is exact."""
    maths.needs_triton(kernel_set)
    words = (*tiny(family), "adapter.variant=dora")
    report = maths.assert_same_maths(words, kernel_set, TOLERANCE, batch(padded=True))
    assert {claim.role for claim in report.claims} == OPS[family]


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_reaches_the_layers(family: str) -> None:
    """With a window as long as the rows the loss is another one, so the tests above see the window."""
    model, _ = pair(*tiny(family), "adapter=full", kernel_set="reference")
    narrow = maths.loss_and_gradients(model, batch(padded=False))[0]
    model.config.sliding_window = LENGTH
    assert maths.apart(maths.loss_and_gradients(model, batch(padded=False))[0], narrow) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), PARAMETERS)
def test_shapes_are_of_the_published_size(family: str, shape: str) -> None:
    model = runs.prepared([f"+model={family}", "model.tiny=true"])[1].family
    config = transformers.AutoConfig.for_model(model.model_types[0], **model.shapes[shape])
    with torch.device("meta"):
        built = getattr(transformers, model.auto_class).from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[family, shape]


def test_every_shape_is_checked() -> None:
    families = {name for name, _ in PARAMETERS}
    shapes = {(name, shape) for name in families for shape in runs.prepared(list(tiny(name)))[1].family.shapes}
    assert shapes == set(PARAMETERS)
