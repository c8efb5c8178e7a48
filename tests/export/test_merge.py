"""The merged model: from files and from memory the same, exact, tied where it still is, in files of any size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcore import checkpoint as sources
from ftcore import pipeline
from ftcore.errors import Refused
from ftcore.merge import merged_weights, write_weights
from ftcore.safetensors_file import checkpoint_files, read_weights
from ftcore.stored_merge import stored
from ftcore.testing import maths, runs
from ftcore.trained_model import Checkpoint

FAMILIES = ("llama", "smollm2", "qwen3", "gemma3", "phi3", "lfm2", "mistral")


def trained(folder: Path, *words: str, save: bool = True):
    """A tiny model with an adapter that does something; saved as a run saves it."""
    hooks, plan = runs.prepared(["model.tiny=true", *words, f"output_dir='{folder}'"])
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    if save:
        loaded.model.save_pretrained(folder / "trained")
    return hooks, plan, loaded


def both(folder: Path, *words: str) -> tuple[Checkpoint, Checkpoint]:
    """The same run for exporters: by its files, and by the model in memory."""
    _, plan, loaded = trained(folder, *words)

    def never() -> torch.nn.Module:
        raise AssertionError("the model was loaded")

    files = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, load=never)
    return files, Checkpoint(tokenizer=loaded.tokenizer, plan=plan, model=loaded.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_memory_give_the_same_weights(family: str, tmp_path: Path) -> None:
    files, memory = both(tmp_path / "run", f"+model={family}", "adapter.alpha=24")
    one, other = files.weights(), memory.weights()
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.shape == other[name].shape
        assert maths.apart(weight.whole().float(), other[name].whole().float()) < 1e-6, name
    ours, theirs = files.config().to_dict(), memory.config().to_dict()
    for key in ("architectures", "tie_word_embeddings", "vocab_size", "hidden_size", "rope_parameters"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize("words", [("adapter.variant=rslora",), ("adapter.dropout=0.1",)])
def test_variants_of_lora_from_files(words: tuple[str, ...], tmp_path: Path) -> None:
    files, memory = both(tmp_path / "run", "+model=llama", *words)
    one, other = files.weights(), memory.weights()
    assert max(maths.apart(one[n].whole(), other[n].whole()) for n in one) < 1e-6


@pytest.mark.parametrize(
    "words",
    [
        ("+model=llama", "adapter.variant=dora"),
        ("+model=smollm2", "adapter.modules_to_save=[lm_head]"),
        ("+model=llama", '\'model.new_tokens=["<a>","<b>"]\''),
        ("+model=qwen3_moe",),
        ("+model=llama", "model.rope_scaling={rope_type: linear, factor: 2.0}"),
    ],
)
def test_what_files_do_not_tell_comes_from_the_model(words: tuple[str, ...], tmp_path: Path) -> None:
    words = tuple(word.strip("'") for word in words)
    _, plan, loaded = trained(tmp_path / "run", *words)
    asked: list[int] = []

    def load() -> torch.nn.Module:
        asked.append(1)
        return loaded.model

    checkpoint = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, load=load)
    folder = write_weights(checkpoint.weights(), checkpoint.config(), loaded.tokenizer, tmp_path / "m", "float32")
    assert asked == [1]
    from transformers import AutoModelForCausalLM

    batch = runs.batch_for(loaded.model)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert maths.apart(runs.logits_of(again, batch), runs.logits_of(loaded.model, batch)) < 1e-5


def test_a_merge_from_files_is_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, plan, loaded = trained(tmp_path / "run", "+model=smollm2")
    files = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, load=lambda: pytest.fail("the model was loaded"))
    folder = write_weights(
        files.weights(), files.config(), loaded.tokenizer, tmp_path / "m", "float32", shard_size=50_000
    )
    assert len(checkpoint_files(folder)) > 3
    assert "lm_head.weight" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    again, notes = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    batch = runs.batch_for(loaded.model)
    assert float((runs.logits_of(again, batch) - runs.logits_of(loaded.model, batch)).abs().max()) <= 1e-5


def with_more(base: Path, target: Path, *names: str) -> Path:
    """A checkpoint that holds further tensors."""
    shutil.copytree(base, target)
    file = target / "model.safetensors"
    save_file({**load_file(file), **{name: torch.ones(4) for name in names}}, file, {"format": "pt"})
    return target


def test_what_old_checkpoints_hold_and_no_model_loads_is_in_no_export(tmp_path: Path) -> None:
    """llama.cpp loads no file with a tensor that it does not know."""
    from gguf import GGUFReader

    from ftcore_exporters.gguf.export import write_files

    _, plan = runs.prepared(["+model=llama", "model.tiny=true"])
    frequencies = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in (0, 1)]
    old = with_more(Path(sources.locate(plan.run.model, plan.family)), tmp_path / "old", *frequencies)
    words = ("+model=llama", f"model.path='{old}'", "model.tiny=false")
    files, memory = both(tmp_path / "run", *words)
    assert files.weights().keys() == memory.weights().keys()
    [(file, _)] = write_files(files, tmp_path / "gguf", ["f32"])
    assert [tensor.name for tensor in GGUFReader(file).tensors if "rot" in tensor.name] == []


def test_layers_that_guess_further_tokens_are_left_out_and_the_models_own_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, DeepseekV3ForCausalLM

    _, plan = runs.prepared(["+model=deepseek_v3", "model.tiny=true"])
    base = Path(sources.locate(plan.run.model, plan.family))
    config = AutoConfig.from_pretrained(base)
    further = with_more(base, tmp_path / "further", "model.layers.61.eh_proj.weight")
    kept = stored(base, None, config)
    assert not isinstance(kept, str)
    for patterns in (DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected, [r"model\.layers\.(61|1)\..*"]):
        # As GLM's patterns, which name the layer after the last of each size that there is.
        monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
        found = stored(further, None, config)
        assert not isinstance(found, str)
        assert found.keys() == kept.keys()


def test_every_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    _, plan, loaded = trained(tmp_path / "run", "+model=llama")
    files = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, load=lambda: loaded.model)
    folder = write_weights(files.weights(), files.config(), loaded.tokenizer, tmp_path / "m", "bfloat16")
    read = load_file(folder / "model.safetensors")
    expected = merged_weights(loaded.model.get_base_model())
    assert all(torch.equal(read[name], expected[name].to(torch.bfloat16)) for name in read)


def test_adapter_over_a_quantized_base_onto_either_weights(tmp_path: Path) -> None:
    words = ("+model=llama", "+quantizer=bnb_nf4")
    _, plan, loaded = trained(tmp_path / "run", *words)
    checkpoint = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, model=loaded.model)
    name = "model.layers.0.self_attn.q_proj.weight"
    over, original = checkpoint.weights()[name].whole(), checkpoint.weights(original=True)[name].whole()
    layer = loaded.model.get_base_model().model.layers[0].self_attn.q_proj
    from bitsandbytes.functional import dequantize_4bit

    rounded = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    delta = layer.get_delta_weight("default").detach().float()
    assert maths.apart(over, rounded + delta) < 1e-6
    plain = runs.loaded(["model.tiny=true", "+model=llama", "adapter=full", "kernels=[]"]).model
    assert maths.apart(original, plain.state_dict()[name].float() + delta) < 1e-6
    assert maths.apart(over, original) > 1e-3


def test_a_model_in_memory_is_not_merged_with_the_adapter_that_it_began_with(tmp_path: Path) -> None:
    _, _, first = trained(tmp_path / "first", "+model=llama")
    words = ("+model=llama", "+quantizer=bnb_nf4", f"adapter.path='{tmp_path / 'first' / 'trained'}'")
    _, plan, loaded = trained(tmp_path / "run", *words)
    name = "model.layers.0.self_attn.q_proj.weight"
    memory = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, model=loaded.model)
    plain = runs.loaded(["model.tiny=true", "+model=llama", "adapter=full", "kernels=[]"]).model
    delta = loaded.model.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default").detach()
    expected = plain.state_dict()[name].float() + delta.float()
    assert maths.apart(memory.weights(original=True)[name].whole(), expected) < 1e-6
    assert maths.apart(merged_weights(first.model.get_base_model())[name].float(), expected) > 1e-3


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(Refused, match=r"cut\.safetensors.*8 bytes are missing at its end"):
        read_weights(cut)
    (tmp_path / "text.safetensors").write_text("not one")
    with pytest.raises(Refused, match=r"text\.safetensors.*no safetensors file"):
        read_weights(tmp_path / "text.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(Refused, match=r"gone\.safetensors, which is not there"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "C:x.safetensors", "a\\b", ""])
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Refused, match="not the name of a file in that folder"):
        checkpoint_files(tmp_path)


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    _, plan, loaded = trained(tmp_path / "run", "+model=llama")
    files = Checkpoint(tokenizer=loaded.tokenizer, plan=plan, load=lambda: loaded.model)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(Refused, match=r"the merged model takes .* KiB, and .* has 97.7 KiB free"):
        write_weights(files.weights(), files.config(), loaded.tokenizer, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert list(tmp_path.glob(".*")) == []
