"""Experts by grouped products: loss and gradients are untouched transformers' and PEFT's, whichever experts are hit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from decoders import DEVICE, SIZES
from peft import LoraConfig, get_peft_model

from ftcore import Requirement, Role
from ftcore.device import Device
from ftcore.patching import BOUND, patch, unpatch
from ftcore.specs import Phase
from ftcore.testing import maths, runs
from ftcore_kernels.layers.experts import mixture, products
from ftcore_kernels.layers.experts.weights import read
from ftcore_kernels.sets._ops import TRITON, kernels

TOLERANCE = 1e-5
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "first_k_dense_replace": 0, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
BOTH = ("experts.gate_up_proj", "experts.down_proj")


def build(family: str, lora: Any = None, **more: Any) -> Any:
    sizes = {name: value for name, value in SIZES.items() if family != "DeepseekV3" or name != "head_dim"}
    config = getattr(transformers, f"{family}Config")(**sizes | FAMILIES[family] | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(DEVICE)
    runs.shake(model)
    if lora is not False:
        options = {"r": 3, "lora_alpha": 7, "target_modules": ["o_proj"], "target_parameters": list(BOTH)}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options | (lora or {})))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        runs.shake(model, trainable_only=True)
    return model.train()


def patched(plain: Any, family: str, kernel_set: str = "reference") -> Any:
    ours = copy.deepcopy(plain)
    needs = {"triton": TRITON, "reference": Requirement()}[kernel_set]
    offered = [kernel for kernel in kernels(kernel_set, needs) if kernel.role == "experts"]
    report = patch(ours, [Role("experts", f"{family}Experts")], offered, Device(), Phase.ADAPTED)
    assert report.counts() == {("experts", f"{kernel_set}.experts"): 2}
    return ours


def batch(rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return {"input_ids": ids, "labels": ids}


def assert_same(plain: Any, ours: Any, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    (loss, gradients), (our_loss, found) = (maths.loss_and_gradients(model, data) for model in (plain, ours))
    assert maths.apart(our_loss, loss) <= TOLERANCE
    assert set(found) == set(gradients)
    far = {name: away for name in found if not (away := maths.apart(found[name], gradients[name])) <= TOLERANCE}
    assert not far
    return found


@pytest.mark.parametrize("kernel_set", ["reference", "triton"])
@pytest.mark.parametrize("lora", [None, {"r": 20, "use_rslora": True}, False], ids=["LoRA", "rank 20", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, lora, kernel_set) -> None:
    maths.needs_triton(kernel_set)
    plain = build(family, lora)
    found = assert_same(plain, patched(plain, family, kernel_set), batch())
    assert [name for name, g in found.items() if not g.isfinite().all()] == []
    assert any("experts" in name and g.any() for name, g in found.items())


@pytest.mark.parametrize("only", BOTH)
def test_lora_on_one_of_the_two(only) -> None:
    plain = build("Qwen3Moe", {"target_parameters": [only]})
    assert_same(plain, patched(plain, "Qwen3Moe"), batch())


def test_one_token() -> None:
    """Most experts get none."""
    plain = build("Qwen3Moe")
    assert_same(plain, patched(plain, "Qwen3Moe"), batch(1, 2))


def test_all_tokens_to_one_expert() -> None:
    plain = build("Mixtral", num_experts_per_tok=1)  # the router's gradient is 0: its one weight is divided by itself
    for module in plain.modules():
        if type(module).__name__ == "MixtralTopKRouter":
            module.weight.data.zero_()  # all the same: the first wins
    ours = patched(plain, "Mixtral")
    found = assert_same(plain, ours, batch())
    factors = next(g for name, g in found.items() if "experts" in name and "lora_A" in name).unflatten(0, (3, -1))
    assert [bool(one.any()) for one in factors] == [True, False, False]


def test_tokens_in_another_order() -> None:
    ours = patched(build("Qwen3Moe", False), "Qwen3Moe").eval()
    experts = next(module for module in ours.modules() if type(module).__name__ == "Qwen3MoeExperts")
    x, index, weights = torch.randn(40, 48), torch.randint(0, 5, (40, 2)), torch.rand(40, 2)
    other = torch.randperm(40)
    with torch.no_grad():
        one, two = (experts(*(t[o].to(DEVICE) for t in (x, index, weights))) for o in (torch.arange(40), other))
    torch.testing.assert_close(two, one[other.to(DEVICE)], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_off_or_merged() -> None:
    plain = build("Qwen3Moe")
    ours, data = patched(plain, "Qwen3Moe"), batch()
    with torch.no_grad(), plain.disable_adapter(), ours.disable_adapter():
        assert maths.apart(ours(**data).logits, plain(**data).logits) <= TOLERANCE
    with torch.no_grad():
        before = ours(**data).logits
        ours.merge_adapter()
        assert maths.apart(ours(**data).logits, before) <= TOLERANCE
        ours.unmerge_adapter()
        assert maths.apart(ours(**data).logits, before) <= TOLERANCE


def test_peft_makes_no_weights_of_all_experts(monkeypatch) -> None:
    from peft.tuners.lora.layer import ParamWrapper

    ours = patched(build("Qwen3Moe"), "Qwen3Moe")
    monkeypatch.setattr(ParamWrapper, "get_delta_factors", lambda *args: pytest.fail("PEFT adapted the weights"))
    maths.loss_and_gradients(ours, batch())


def test_the_wrapper_is_patched_and_comes_off() -> None:
    plain = build("Qwen3Moe")
    ours = patched(plain, "Qwen3Moe")
    outer = ours.get_base_model().model.layers[0].mlp.experts
    assert type(outer).__name__ == "ParamWrapper" and BOUND in vars(outer)
    base, factors = read(outer)
    assert type(base).__name__ == "Qwen3MoeExperts" and set(factors) == {"gate_up_proj", "down_proj"}
    assert unpatch(ours) == 2
    assert_same(plain, ours, batch())


@pytest.mark.parametrize("ends", [[4, 4, 10], [0, 0, 10], [10, 10, 10], [1, 2, 10]])
def test_grouped_products(ends) -> None:
    x, w = torch.randn(10, 6, dtype=torch.float64), torch.randn(3, 8, 6, dtype=torch.float64)
    bounds = torch.tensor(ends, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *t: products.grouped(*t, bounds), (x.requires_grad_(), w.requires_grad_()))
    group = torch.searchsorted(bounds, torch.arange(10, dtype=torch.int32), right=True)
    torch.testing.assert_close(products.grouped(x, w, bounds), torch.einsum("sk,snk->sn", x, w[group]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="PyTorch's grouped GEMM is for GPUs here")
@pytest.mark.parametrize("shape", [(512, 256, 128, 6), (77, 64, 32, 5), (3, 64, 32, 9)])
def test_grouped_gemm_is_the_loop(shape, monkeypatch) -> None:
    rows, k, n, experts = shape
    x, w = torch.randn(rows, k).cuda().bfloat16(), torch.randn(experts, n, k).cuda().bfloat16()
    ends = torch.randint(0, rows + 1, (experts,)).sort()[0].int().cuda()
    ends[-1] = rows
    dout = torch.randn(rows, n).cuda().bfloat16()
    found = []
    for at_once in (products._at_once, lambda *tensors: False):
        monkeypatch.setattr(products, "_at_once", at_once)
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        out = products.grouped(*inputs, ends)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, dout)])
    for one, other in zip(*found, strict=True):
        assert maths.apart(one, other) <= 4e-3


def test_the_activation_is_the_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has a class of its own for SiLU."""
    from ftcore_kernels.reference import swiglu as twin

    calls: list[torch.Size] = []

    def counted(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        calls.append(gate.shape)
        return own(gate, up)

    own = twin.swiglu
    monkeypatch.setattr(twin, "swiglu", counted)
    for family in FAMILIES:
        calls.clear()
        patched(build(family, lora=False), family)(input_ids=torch.arange(3, 9, device=DEVICE)[None])
        assert calls, family


def test_what_a_router_leaves_in_32_bits_weighs_so() -> None:
    """As in transformers, where Mixtral's weights and DeepSeek's are float32 beside experts in bfloat16."""
    torch.manual_seed(3)
    base = SimpleNamespace(
        gate_up_proj=torch.randn(4, 32, 16, dtype=torch.bfloat16),
        down_proj=torch.randn(4, 16, 16, dtype=torch.bfloat16),
    )
    x, index, weights = torch.randn(9, 16, dtype=torch.bfloat16), torch.randint(0, 4, (9, 1)), torch.rand(9, 1)
    alone = mixture(x, index, torch.ones(9, 1), base, {}, lambda gate, up: gate * up)
    found = mixture(x, index, weights, base, {}, lambda gate, up: gate * up)
    assert torch.equal(found, alone * weights)
    assert not torch.equal(found, alone * weights.bfloat16().float())
