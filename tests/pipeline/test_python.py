"""ftcore from Python: load into TRL and into a plain loop, export, and override single hooks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ftcore
from ftcore.errors import PluginError

LOAD = ["+model=llama", "model.tiny=true"]


def rows(tokenizer) -> dict[str, torch.Tensor]:
    return tokenizer(["one two three", "four five"], return_tensors="pt", padding=True)


def test_a_plain_pytorch_loop(in_tmp: Path) -> None:
    model, tokenizer = ftcore.load(LOAD)
    batch = rows(tokenizer)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert list(in_tmp.iterdir()) == [], "loading writes nothing into the working directory"


def test_trl_trains_a_loaded_model_and_the_kernels_stay(in_tmp: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = ftcore.load(LOAD)
    data = Dataset.from_list([{"text": "a short row of text"}] * 8)
    arguments = SFTConfig("out", max_steps=2, bf16=False, use_cpu=True, report_to="none", learning_rate=1e-2)
    result = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    assert result.global_step == 2
    kinds = {kind: [m for m in model.modules() if type(m).__name__ == kind] for kind in LAYER}
    claimed = {kind: {"forward" in vars(module) for module in found} for kind, found in kinds.items()}
    assert claimed == {"LlamaDecoderLayer": {True}, "LlamaAttention": {False}, "LlamaMLP": {False}}
    assert "forward" in vars(model.get_base_model().model.norm)


LAYER = ("LlamaDecoderLayer", "LlamaAttention", "LlamaMLP")
"""A whole-layer kernel, and what stays plain within it."""


def test_export_writes_what_was_trained(in_tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = ftcore.load([*LOAD, "adapter.init=gaussian"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    artifacts = ftcore.export(
        model, tokenizer, ["+export=[safetensors,adapter]", "export.safetensors.dtype=float32"], "out"
    )
    assert [a.target for a in artifacts] == ["safetensors", "adapter"]
    assert all(a.size > 1000 for a in artifacts)
    assert not (in_tmp / "out" / ".merged").exists()
    merged = AutoModelForCausalLM.from_pretrained(artifacts[0].path, dtype=torch.float32)
    batch = rows(tokenizer)
    real = batch["attention_mask"].bool()  # what a model answers at a pad is its own business
    model.eval()
    with torch.no_grad():
        wanted, got = model(**batch).logits[real], merged(**batch).logits[real]
    assert (wanted - got).abs().max() < 1e-5
    model.disable_adapter_layers()
    with torch.no_grad():
        assert (wanted - model(**batch).logits[real]).abs().max() > 1e-3, (
            "the adapter changes nothing: the test would prove nothing"
        )


def test_a_model_from_elsewhere_is_refused() -> None:
    with pytest.raises(ftcore.Refused, match=r"did not come from ftcore\.load"):
        ftcore.export(torch.nn.Linear(1, 1), None, ["+export=[safetensors]"])  # type: ignore[arg-type]


def test_one_hook_from_python_changes_what_it_should(tiny_run) -> None:
    plain = tiny_run("output_dir=plain", "kernels=[]")
    seen = []

    @ftcore.hookimpl(wrapper=True)
    def ftcore_format_dataset():
        dataset = yield
        seen.append(len(dataset["train"]))
        dataset["train"] = dataset["train"].select(range(8))
        return dataset

    changed = tiny_run("output_dir=changed", "kernels=[]", plugins=(ftcore_format_dataset,))
    assert seen == [128]
    assert changed.metrics["loss_first"] != plain.metrics["loss_first"]
    assert changed.metrics["eval_loss_before"] == plain.metrics["eval_loss_before"]


def test_the_same_from_the_command_line(tiny_run, in_tmp: Path) -> None:
    (in_tmp / "my_hooks.py").write_text(
        "import ftcore\n\n@ftcore.hookimpl\ndef ftcore_evaluate(trainer):\n    return {'eval_loss': 42.0}\n"
    )
    result = tiny_run("plugins=[my_hooks.py]")
    assert result.metrics["eval_loss"] == 42.0
    assert result.metrics["eval_loss_before"] != 42.0
    assert "my_hooks.py" in (result.output_dir / "config.yaml").read_text()


def test_an_override_of_loading_reaches_the_pipeline(tiny_run) -> None:
    @ftcore.hookimpl(wrapper=True)
    def ftcore_load_model():
        model = yield
        with torch.no_grad():
            model.model.norm.weight.zero_()
        return model

    result = tiny_run(plugins=(ftcore_load_model,))
    assert result.metrics["eval_loss_before"] == pytest.approx(torch.log(torch.tensor(259.0)).item(), abs=1e-4)


@pytest.mark.parametrize("hook", ["ftcore_load_dataset", "ftcore_format_dataset"])
def test_rows_that_are_not_given_by_split_are_refused(hook: str, tiny_run) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": "a"}])
    answers = iter([rows, DatasetDict({"test": rows})])

    def override() -> object:
        return next(answers)

    override.__name__ = hook
    for has in ("Dataset", "the splits test"):
        with pytest.raises(PluginError) as wrong:
            tiny_run(plugins=(ftcore.hookimpl(override),))
        assert str(wrong.value) == (
            f"{hook} gives the rows by split, with one called train, and this is {has}\n"
            "    fix: return DatasetDict({'train': ...})"
        )


def makes_collator() -> object:
    @ftcore.hookimpl
    def ftcore_make_collator(plan, tokenizer):
        from transformers import DataCollatorForSeq2Seq

        collate = DataCollatorForSeq2Seq(tokenizer)

        def mine(rows):
            seen.append(len(rows))
            return collate(rows)

        return mine

    seen: list[int] = []
    return SimpleNamespace(ftcore_make_collator=ftcore_make_collator, seen=seen)


def test_a_collator_that_the_trainer_does_not_take_is_refused_before_weights_are_loaded(in_tmp: Path) -> None:
    @ftcore.hookimpl
    def ftcore_load_model():
        raise AssertionError("weights are loaded")

    words = [*LOAD, "+trainer=dpo", "trainer.max_steps=1", "prompts=[]"]
    with pytest.raises(ftcore.Refused) as refused:
        ftcore.run(words, plugins=[makes_collator(), ftcore_load_model])
    assert str(refused.value) == (
        "plugins: dpo makes its own collator and takes none\n"
        "    fix: leave ftcore_make_collator out, or override ftcore_make_trainer"
    )


def test_a_collator_that_the_trainer_takes_is_used_and_rewards_that_it_asks_not_are_said(tiny_run, capsys) -> None:
    @ftcore.hookimpl
    def ftcore_rewards():
        def mine(completions, **_):
            raise AssertionError("asked")

        return [mine]

    collator: Any = makes_collator()
    tiny_run("prompts=[]", plugins=(collator, ftcore_rewards))
    assert collator.seen
    assert "sft asks no rewards: mine of ftcore_rewards changes nothing" in capsys.readouterr().out


def test_export_refuses_words_that_would_change_nothing(in_tmp: Path) -> None:
    model, tokenizer = ftcore.load(LOAD)
    for word, fix in {
        "output_dir=there": "give output_dir='FOLDER' as an argument",
        "plugins=[mine.py]": "give plugins=[...] as an argument",
        "adapter.r=64": "give it to ftcore.load",
        "+model=llama": "give it to ftcore.load",
        "output=there": "give it to ftcore.load",
    }.items():
        with pytest.raises(ftcore.Refused) as refused:
            ftcore.export(model, tokenizer, ["+export=[adapter]", word])
        key = word.lstrip("+").partition("=")[0]
        assert str(refused.value).startswith(f"{key}: is no setting of an exporter\n    fix: {fix}")
    with pytest.raises(ftcore.Refused, match=r"overrides: is a string\n +fix: .*\+export=\[adapter\]"):
        ftcore.export(model, tokenizer, "+export=[adapter]")
    assert list(in_tmp.iterdir()) == []


def test_a_recorded_run_goes_on_as_it_does_from_the_command_line(tiny_run, in_tmp: Path) -> None:
    tiny_run("output_dir=one", "trainer.save_steps=1", "prompts=[]")
    result = ftcore.run(["run=one", "resume=last", "trainer.max_steps=3"])
    assert result.output_dir == Path("one")
    assert sorted(path.name for path in in_tmp.iterdir()) == ["one"]
