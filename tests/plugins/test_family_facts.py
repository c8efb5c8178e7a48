"""What families say of themselves beside kernels: targets, limits, checkpoints as published, chat, and the coverage."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.catalog import installed
from ftcore.coverage import TRAITS, coverage, families_for, family_of
from ftcore.errors import Refused
from ftcore.merge import write_merged
from ftcore.specs import ModelFamily
from ftcore.tasks import plugins
from ftcore.testing import maths, runs

OWN = [option for option in installed().options("model") if option.dist == "ftcore"]
PLAIN = ("model.dtype=float32", "kernels=[]")
CLAIMED = {
    "csm": {"rms_norm", "mlp", "attention"},
    "deepseek_v3": {"rms_norm", "mlp", "lm_head"},
    "gemma": {"rms_norm", "attention", "lm_head", "decoder_layer"},
    "gemma3n": {"lm_head"},
    "gpt_oss": {"lm_head"},
    "lfm2": {"rms_norm", "lm_head"},
    "llama4": {"rms_norm", "mlp", "lm_head"},
    "mixtral": {"rms_norm", "lm_head"},
    "orpheus": {"rms_norm", "mlp", "attention", "lm_head", "decoder_layer"},
    "qwen3_moe": {"rms_norm", "mlp", "attention", "lm_head"},
}
"""Roles that at least have kernels."""
TEMPLATES = {
    "deepseek_v3": "deepseekv3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "gpt_oss": "gptoss",
    "llama": "llama3_2",
    "phi3": "phi3",
    "qwen2": "qwen2_5",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_instruct_2507",
}
"""Families to the official templates that TRL carries."""


def tiny(family: str) -> tuple[str, ...]:
    return (f"+model={family}", "model.tiny=true", "model.dtype=float32")


def family(name: str) -> ModelFamily:
    found = family_of(installed().find("model", name))
    assert found
    return found


def refusals(*words: str) -> dict[str, str]:
    """Key to message of everything that the plan refuses."""
    return {problem.key: problem.message for problem in runs.refusals(words)}


# Kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMED)
def test_roles_with_kernels(name: str) -> None:
    rows = coverage(family(name))
    assert {row.role.name for row in rows if row.sets} >= CLAIMED[name]
    for row in rows:
        assert bool(row.reasons) == (not row.sets or bool(row.uncovered))
        assert row.uncovered <= row.role.traits


def test_every_own_trait_is_explained() -> None:
    used = {trait for option in OWN for role in family(option.name).roles for trait in role.traits}
    assert used == set(TRAITS)


def test_the_plugin_page_shows_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert plugins.main(["model/gpt_oss"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    said = family("gpt_oss")
    for row in coverage(said):
        expected = [row.role.name, row.role.module, ", ".join(row.sets) or "none", "; ".join(row.reasons)]
        assert " ".join(expected).strip() in lines
    assert any(line.startswith("attention_sinks ") for line in lines)
    assert f"trainer.packing {said.limits[0].reason}" in lines
    assert "thinking temperature=1.0, top_p=1.0" in lines
    assert "parameters experts.gate_up_proj, experts.down_proj" in lines


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("dropout", "0.1"), ("variant", "dora"), ("init", "pissa")])
def test_experts_have_no_such_adapters(key: str, value: str) -> None:
    words = (*tiny("mixtral"), f"adapter.{key}={value}")
    assert list(refusals(*words)) == [f"adapter.{key}"]
    assert refusals(*words, "adapter.targets=[q_proj,v_proj]") == {}


def test_targets_choose_among_parameters() -> None:
    loaded = runs.loaded([*tiny("qwen3_moe"), "adapter.targets=[q_proj,experts.down_proj]"])
    found = {(path.rpartition(".")[2], getattr(m, "parameter_name", None)) for path, m in loaded.model.named_modules()}
    assert {pair for pair in found if pair[1]} == {("experts", "down_proj")}
    trained = {
        name.split(".lora_")[0].rpartition(".")[2] for name, p in loaded.model.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "experts"}
    assert list(refusals(*tiny("qwen3_moe"), "adapter.targets=[experts.up]")) == ["adapter.targets"]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4", "mixtral", "qwen3_moe"])
def test_routers_are_left_alone(name: str) -> None:
    model = runs.loaded(tiny(name)).model
    routers = [path for path, m in model.named_modules() if type(m).__name__.lower().endswith("router")]
    assert routers
    assert not [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(tuple(routers))]


def test_queries_without_a_latent_get_an_adapter(tmp_path: Path) -> None:
    said = family("deepseek_v3")
    config = transformers.AutoConfig.for_model("deepseek_v3", **{**said.tiny, "q_lora_rank": None})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer(None).save_pretrained(tmp_path)
    model = runs.loaded(["+model=deepseek_v3", f"model.path='{tmp_path}'", *PLAIN]).model
    assert any(".q_proj.lora_A." in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_merged_experts_have_the_published_names(name: str, tmp_path: Path) -> None:
    loaded = runs.loaded(tiny(name))
    weights = load_file(write_merged(loaded.model, loaded.tokenizer, tmp_path / "m", "bfloat16") / "model.safetensors")
    plain: Any = runs.loaded([*tiny(name), *PLAIN, "adapter=full"])
    plain.model.save_pretrained(tmp_path / "plain")
    assert weights.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    assert sum(".experts.0." in key for key in weights) == 3 * sum(
        ".experts" in k for k in weights_of_layers(plain.model)
    )
    kinds = {key.rpartition(".")[2]: weight.dtype for key, weight in weights.items()}
    assert kinds.pop("e_score_correction_bias", torch.float32) == torch.float32  # it decides which experts run
    assert set(kinds.values()) == {torch.bfloat16}


def weights_of_layers(model: Any) -> set[str]:
    """Where experts are."""
    return {path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")}


# Quantizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3n", "gpt_oss", "lfm2", "llama4", "mixtral"])
def test_families_train_over_nf4(name: str) -> None:
    model = runs.loaded([*tiny(name), "+quantizer=bnb_nf4"]).model
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    runs.shake(model, trainable_only=True)
    _, gradients = maths.loss_and_gradients(model, runs.batch_for(model))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
def test_dense_layers_as_parameters_are_not_quantized(name: str) -> None:
    words = (*tiny(name), "+quantizer=bnb_nf4")
    assert list(refusals(*words)) == ["quantizer"]
    fix = next(limit.fix for limit in family(name).limits if limit.key == "quantizer")
    assert refusals(*words, fix.split("'")[1]) == {}
    assert refusals(*words[:-1]) == {}


def test_published_qwen3_moe_may_be_quantized() -> None:
    words = ["+model=qwen3_moe", "model.shape=qwen3-30b-a3b", "+quantizer=bnb_nf4"]
    assert refusals(*words) == {}


# Packing ------------------------------------------------------------------------------------------------------------


def of_the_last(model: Any, documents: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Logits of the last of packed documents."""
    inputs = runs.packed(documents)
    del inputs["labels"]
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits[:, -documents[-1]["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", ["gpt_oss", "lfm2"])
def test_refused_packing_would_mix_documents(name: str) -> None:
    """The day this fails, the refusal can go."""
    assert list(refusals(*tiny(name), "+trainer=sft", "trainer.packing=true")) == ["trainer.packing"]
    model = runs.loaded([*tiny(name), "adapter=full", "kernels=[]"]).model
    runs.shake(model)
    documents = [runs.document(9), runs.document(12)]
    assert maths.apart(of_the_last(model, documents), of_the_last(model, documents[1:])) > 1e-4


def test_llama4_packs_rows_below_its_temperature_floor() -> None:
    words = (*tiny("llama4"), "+trainer=sft", "trainer.packing=true")
    context = {"trainer.max_length"}  # the tiny model's own
    assert set(refusals(*words, "trainer.max_length=8191")) == context
    assert set(refusals(*words, "trainer.max_length=8192")) == context | {"trainer.packing"}


def test_llama4_counts_from_the_start_of_the_row() -> None:
    """Why long rows are refused: the temperature rises with the row, not with the document; chunks are right."""
    for short, same in ({"attention_chunk_size": 8}, True), ({"floor_scale": 8}, False):
        config = transformers.AutoConfig.for_model("llama4_text", **{**family("llama4").tiny, **short})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        runs.shake(model)
        documents = [runs.document(5), runs.document(7)]
        distance = maths.apart(of_the_last(model, documents), of_the_last(model, documents[1:]))
        assert distance < 1e-5 if same else distance > 1e-4


# Checkpoints as they are published ----------------------------------------------------------------------------------


def same_as_tiny(name: str, folder: Path) -> None:
    """What is in the folder is the tiny model."""
    there = runs.loaded([f"+model={name}", f"model.path='{folder}'", *PLAIN, "adapter=full"])
    maths.assert_same_logits(there, runs.loaded([*tiny(name), *PLAIN, "adapter=full"]), 1e-6)


def test_llama4_of_a_vision_checkpoint(tmp_path: Path) -> None:
    loaded: Any = runs.loaded([*tiny("llama4"), *PLAIN, "adapter=full"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vision_output_dim": 32, "image_size": 28}
    sizes |= {"projector_input_dim": 32, "projector_output_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Llama4Config(text_config=loaded.model.config.to_dict(), vision_config=sizes)
    whole = transformers.Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(loaded.model.state_dict())
    whole.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    same_as_tiny("llama4", tmp_path)


def test_gemma3n_of_a_checkpoint_with_towers(tmp_path: Path) -> None:
    loaded: Any = runs.loaded([*tiny("gemma3n"), *PLAIN, "adapter=full"])
    weights = {f"model.language_model.{n.removeprefix('model.')}": w for n, w in loaded.model.state_dict().items()}
    del weights["model.language_model.lm_head.weight"]  # tied
    towers = {"model.vision_tower.stem.weight": torch.zeros(3), "model.audio_tower.stem.weight": torch.zeros(3)}
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    config |= {"text_config": loaded.model.config.to_dict(), "vision_config": {"model_type": "gemma3n_vision"}}
    publish(tmp_path, {n: w.clone() for n, w in (weights | towers).items()}, config, loaded.tokenizer)
    same_as_tiny("gemma3n", tmp_path)


def publish(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], tokenizer: Any) -> None:
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_gpt_oss_in_mxfp4_is_trained_dequantized(tmp_path: Path) -> None:
    loaded: Any = runs.loaded([*tiny("gpt_oss"), *PLAIN, "adapter=full"])
    weights, drawn = {}, torch.Generator().manual_seed(0)
    for name, weight in loaded.model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = weight.clone()
            continue
        experts, inputs, outputs = weight.shape
        blocks = (experts, outputs, inputs // 32, 16)
        weights[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=drawn, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full(blocks[:3], 120, dtype=torch.uint8)  # 2**-7
    config = loaded.model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    publish(tmp_path, weights, config, loaded.tokenizer)
    there: Any = runs.loaded(["+model=gpt_oss", f"model.path='{tmp_path}'", *PLAIN])
    experts = there.model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
    low = weights["model.layers.1.mlp.experts.down_proj_blocks"][..., 0] & 0xF  # the first of every 32 inputs
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    signed = values[(low & 7).long()] * torch.where(low >= 8, -1.0, 1.0) / 128
    assert torch.equal(experts.down_proj.data[:, ::32], signed.transpose(1, 2))
    assert experts.down_proj.dtype == torch.float32
    runs.shake(there.model, trainable_only=True)
    assert maths.loss_and_gradients(there.model, runs.batch_for(there.model))[0].isfinite()


def test_deepseek_in_fp8_is_trained_dequantized(tmp_path: Path) -> None:
    loaded: Any = runs.loaded([*tiny("deepseek_v3"), *PLAIN, "adapter=full"])
    loaded.model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [n for n in weights if n.endswith("proj.weight")]:
        # 448 = 7 * 2**6: with a scale of a power of two, what fp8 holds is exact, and so is what comes back.
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in weights[name].shape]
        weights[f"{name}_scale_inv"] = torch.full(blocks, 0.5)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"quantization_config": fp8}
    publish(tmp_path, weights, config, loaded.tokenizer)
    there: Any = runs.loaded(["+model=deepseek_v3", f"model.path='{tmp_path}'", *PLAIN])
    layer = there.model.get_base_model().model.layers[1]
    expected = weights["model.layers.1.self_attn.o_proj.weight"].float() * 0.5
    assert torch.equal(layer.self_attn.o_proj.get_base_layer().weight.data, expected)
    first = weights["model.layers.1.mlp.experts.0.down_proj.weight"].float() * 0.5
    assert torch.equal(layer.mlp.experts.get_base_layer().down_proj.data[0], first)


@pytest.mark.parametrize("option", OWN, ids=lambda option: option.name)
def test_a_checkpoint_of_another_family_is_sent_there(option: Any, tmp_path: Path) -> None:
    said = family(option.name)
    other = "llama" if "llama" not in said.model_types else "qwen3"
    for model_type in said.model_types:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        with pytest.raises(Refused) as refused:
            runs.prepared([f"+model={other}", f"model.path='{tmp_path}'"])
        (problem,) = refused.value.problems
        assert f"is a '{model_type}' checkpoint, but {other} takes {other}" in problem.message
        assert problem.fix == f"use +model={families_for(model_type)[0]}"
        assert option.name in families_for(model_type)


def test_a_checkpoint_of_no_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "fnord"}', encoding="utf-8")
    with pytest.raises(Refused, match="no installed family takes 'fnord'"):
        runs.prepared(["+model=llama", f"model.path='{tmp_path}'"])


@pytest.mark.parametrize("option", OWN, ids=lambda option: option.name)
def test_the_default_checkpoint_is_listed(option: Any) -> None:
    assert option.config_class()().id in family(option.name).checkpoints


# Chat ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_facts_are_those_of_the_official_template(name: str) -> None:
    template = (files("trl") / "chat_templates" / f"{TEMPLATES[name]}.jinja").read_text(encoding="utf-8")
    tokenizer, chat = byte_tokenizer(template), family(name).chat
    assert chat
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    assert text[text.rindex("Me.") :].strip().startswith(tuple(f"Me.{end}" for end in chat.turn_ends))
    system = [{"role": "system", "content": "Be brief."}, *messages]
    if chat.system:
        assert "Be brief." in str(tokenizer.apply_chat_template(system, tokenize=False))
    else:
        with pytest.raises(Exception, match="System role not supported"):
            tokenizer.apply_chat_template(system, tokenize=False)
