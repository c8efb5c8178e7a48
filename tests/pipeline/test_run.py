"""Whole runs on tiny models: what is written, what is trained, and what is left alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import ftcore
from ftcore.composition import compose, to_yaml, typed
from ftcore.errors import Refused


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_folder_tells_the_whole_story(tiny_run) -> None:
    result = tiny_run("+export=[safetensors,adapter]", "prompts=[Hello]")
    folder = result.output_dir
    assert folder.name == "qwen3-sft-001"
    state = json.loads((folder / "run.json").read_text())
    assert state["status"] == "done"
    assert state["steps"] == 2
    assert state["versions"]["transformers"]
    assert {c["role"] for c in state["patches"]["claims"]} >= {"rms_norm", "lm_head"}
    assert {"loss_first", "loss_last", "eval_loss", "eval_loss_before"} <= state["metrics"].keys()
    assert [a["target"] for a in state["artifacts"]] == ["safetensors", "adapter"]
    assert [a["prompt"] for a in state["answers"]] == ["Hello"]
    assert (folder / "trained" / "adapter_model.safetensors").is_file()
    assert not (folder / ".merged").exists()
    losses = [m["loss"] for m in metrics_of(folder) if "loss" in m]
    assert len(losses) == 2
    assert all(math.isfinite(x) for x in losses)


def test_the_recorded_config_is_the_config(tiny_run) -> None:
    result = tiny_run("trainer.learning_rate=3e-4")
    recorded = yaml.safe_load((result.output_dir / "config.yaml").read_text())
    assert recorded["trainer"]["learning_rate"] == 3e-4
    again = typed(compose([f"run={result.output_dir}", "trainer.learning_rate=5e-4", "+export=[adapter]"]))
    assert again.trainer.learning_rate == 5e-4
    assert list(again.export) == ["adapter"]
    assert type(again.trainer).__module__ == "ftcore_trainers.sft"
    first = typed(compose([f"run={result.output_dir}"]))
    assert yaml.safe_load(to_yaml(first)) == {**recorded, "run": str(result.output_dir)}


def test_nobody_writes_answers_where_there_is_no_generator(tiny_run) -> None:
    result = tiny_run("~generator")
    assert result.answers == []
    with pytest.raises(Refused, match="use generator=fast"):
        tiny_run("~generator", "prompts=[Hello]", "output_dir=asked")
    assert not Path("asked").exists(), "before anything else"


def test_same_seed_same_run(tiny_run) -> None:
    one, two = tiny_run("output_dir=one"), tiny_run("output_dir=two")
    assert one.metrics["loss_last"] == two.metrics["loss_last"]
    other = tiny_run("output_dir=three", "trainer.seed=7")
    assert other.metrics["loss_last"] != one.metrics["loss_last"]


def test_accumulation_gives_the_same_steps(tiny_run) -> None:
    """With SGD: Adam's first steps turn rounding into signs."""
    plain = ("trainer.optimizer=sgd", "trainer.learning_rate=0.5", "trainer.max_steps=4")
    whole = tiny_run("output_dir=one", "trainer.micro_batch=4", *plain)
    parts = tiny_run("output_dir=two", "trainer.micro_batch=1", *plain)
    assert parts.metrics["loss_last"] == pytest.approx(whole.metrics["loss_last"], abs=1e-5)
    assert whole.metrics["loss_last"] < whole.metrics["loss_first"] - 0.1


def bytes_kept(model: torch.nn.Module) -> int:
    """What a forward pass of some rows leaves allocated for its backward pass."""
    from ftcore.testing import runs

    batch = runs.batch_for(model, length=64)
    model.train()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = model(**batch).loss
    del loss
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_memory_decides_about_recomputation_and_changes_no_number(tiny_run, monkeypatch) -> None:
    """Layers that a kernel took over recompute by themselves, all others are checkpointed; never both."""
    import transformers.modeling_utils
    from transformers.modeling_layers import GradientCheckpointingLayer

    seen, kept, checkpointed = {}, {}, []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(function, *args, **kwargs):
        layers = [x for x in (*args, *getattr(function, "args", ())) if isinstance(x, GradientCheckpointingLayer)]
        checkpointed.extend(layers)  # the plain head checkpoints its chunks, which is no layer's business
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)

    def spy(name: str):
        @ftcore.hookimpl(wrapper=True)
        def ftcore_train(trainer):
            kept[name] = bytes_kept(trainer.model)
            checkpointed.clear()
            result = yield
            seen[name] = (
                trainer.args.gradient_checkpointing,
                trainer.args.bf16,
                trainer.model.is_gradient_checkpointing,
                bool(checkpointed),
            )
            return result

        return ftcore_train

    runs = {}
    for name, words in {
        "off": ("memory=off",),
        "least": ("memory=least",),
        "plain off": ("memory=off", "kernels=[]"),
        "plain least": ("memory=least", "kernels=[]"),
    }.items():
        runs[name] = tiny_run(f"output_dir={name.replace(' ', '-')}", *words, plugins=(spy(name),))
    nothing = (False, False, False, False)
    assert seen == {"off": nothing, "least": nothing, "plain off": nothing, "plain least": (False, False, True, True)}
    assert kept["least"] < kept["off"] < kept["plain off"]
    assert kept["plain least"] < kept["plain off"]
    for result in runs.values():
        assert result.metrics["eval_loss"] == pytest.approx(runs["off"].metrics["eval_loss"], abs=1e-6)


def test_full_fine_tuning_saves_a_whole_model(tiny_run) -> None:
    from transformers import AutoModelForCausalLM

    result = tiny_run("adapter=full", "trainer.learning_rate=1e-3")
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    model = AutoModelForCausalLM.from_pretrained(result.output_dir / "trained")
    assert sum(p.numel() for p in model.parameters()) > 50_000


def test_grpo_runs_as_is_and_its_reward_is_recorded(in_tmp: Path) -> None:
    result = ftcore.run(
        ["+model=qwen3", "model.tiny=true", "+trainer=grpo", "trainer.max_steps=2", "trainer.max_completion_length=8"]
    )
    recorded = yaml.safe_load((result.output_dir / "config.yaml").read_text())
    assert recorded["data"]["name"] == "prompts"
    assert list(recorded["reward"]) == ["length"]
    steps = [m for m in metrics_of(result.output_dir) if "reward" in m]
    assert len(steps) == 2
    assert all(-10 < m["reward"] <= 0 for m in steps)
    assert "rewards/length/mean" in steps[0]


def test_a_reward_of_ones_own_replaces_the_samples(in_tmp: Path) -> None:
    (in_tmp / "mine.py").write_text("def half(completions, **_):\n    return [0.5] * len(completions)\n")
    words = [
        "+model=qwen3",
        "model.tiny=true",
        "+trainer=grpo",
        "trainer.max_steps=1",
        "trainer.max_completion_length=4",
    ]
    by_key = ftcore.run([*words, "rewards=[mine.py:half]"])
    assert metrics_of(by_key.output_dir)[0]["reward"] == 0.5

    @ftcore.hookimpl
    def ftcore_rewards():
        def quarter(completions, **_):
            return [0.25] * len(completions)

        return [quarter]

    by_hook = ftcore.run(words, plugins=[ftcore_rewards])
    assert metrics_of(by_hook.output_dir)[0]["reward"] == 0.25
    assert yaml.safe_load((by_hook.output_dir / "config.yaml").read_text())["reward"] == {}


def test_continue_from_a_saved_adapter(tiny_run) -> None:
    first = tiny_run("trainer.learning_rate=1e-2")
    second = tiny_run(f"adapter.path={first.output_dir / 'trained'}")
    assert second.metrics["eval_loss_before"] == pytest.approx(first.metrics["eval_loss"], abs=1e-5)


def test_resume_from_the_last_checkpoint(tiny_run) -> None:
    unbroken = tiny_run("output_dir=unbroken", "trainer.max_steps=4")
    tiny_run("output_dir=broken", "trainer.max_steps=4", "trainer.save_steps=2")
    last = Path("broken/checkpoints/checkpoint-4")
    assert last.is_dir()
    import shutil

    shutil.rmtree(last)
    resumed = tiny_run("output_dir=broken", "trainer.max_steps=4", "trainer.save_steps=2", "resume=last")
    assert resumed.metrics["eval_loss"] == pytest.approx(unbroken.metrics["eval_loss"], abs=1e-6)


def test_a_failing_run_says_so_in_its_folder(tiny_run) -> None:
    @ftcore.hookimpl
    def ftcore_train():
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        tiny_run("output_dir=bad", plugins=(ftcore_train,))
    state = json.loads(Path("bad/run.json").read_text())
    assert state["status"] == "failed"
    assert state["error"] == "ValueError: boom"


def test_trackers_never_stop_training(tiny_run, monkeypatch) -> None:
    import trackio

    def fail(*_, **__):
        raise ConnectionError("down")

    monkeypatch.setattr(trackio, "init", fail)
    assert tiny_run("+extra=[trackio]").metrics["eval_loss"]


def test_trackio_and_the_second_copy_get_the_metrics(tiny_run, in_tmp: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(in_tmp / "trackio"))
    import trackio

    logged: list[dict[str, float]] = []
    monkeypatch.setattr(trackio, "init", lambda **_: None)
    monkeypatch.setattr(trackio, "log", lambda values, step: logged.append(values))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    tiny_run("+extra=[trackio,jsonl]", "extra.jsonl.path=all.jsonl")
    assert [v["loss"] for v in logged if "loss" in v]
    assert len(Path("all.jsonl").read_text().splitlines()) >= 2


def test_packed_rows_train_like_separate_rows(tiny_run) -> None:
    result = tiny_run("data=text", "trainer.packing=true", "trainer.max_length=512")
    assert math.isfinite(result.metrics["loss_last"])
    assert torch.isfinite(torch.tensor(result.metrics["train_loss"]))


def test_a_recorded_run_is_never_written_over(tiny_run, in_tmp: Path) -> None:
    from ftcore import cli

    first = tiny_run("output_dir=kept")
    before = (in_tmp / "kept/run.json").read_text()
    assert cli.run([f"run={first.output_dir}", "trainer.max_steps=1", "trainer.learning_rate=1e-4"]) == 0
    assert (in_tmp / "kept/run.json").read_text() == before
    assert (in_tmp / "runs/qwen3-sft-001/run.json").is_file()


def test_early_stopping_stops(tiny_run) -> None:
    words = ("trainer.max_steps=12", "trainer.eval_steps=1", "trainer.early_stopping=2", "trainer.learning_rate=1e-12")
    result = tiny_run(*words, "output_dir=stopped")
    assert json.loads(Path("stopped/run.json").read_text())["steps"] < 12
    assert math.isfinite(result.metrics["eval_loss"])


def test_a_moved_data_file_does_not_matter_to_a_finished_run(tiny_run, in_tmp: Path) -> None:
    from ftcore import cli

    rows = in_tmp / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row number {i}"}) + "\n" for i in range(8)))
    run = tiny_run("data.path=rows.jsonl", "prompts=[Hi]")
    rows.unlink()
    assert cli.run(["export", f"run={run.output_dir}", "+export=[adapter]"]) == 0


def test_compose_stays_a_function(tiny_run) -> None:
    tiny_run("trainer.max_steps=1")
    assert callable(ftcore.compose)
    assert ftcore.compose(["+model=qwen3"]).model.name == "qwen3"


def test_a_longer_context_is_asked_for_and_scaled(tiny_run) -> None:
    longer = "trainer.max_length=4096"
    with pytest.raises(ftcore.Refused, match="more than the model's context of 2048"):
        tiny_run(longer)
    asked = "model.rope_scaling={rope_type: yarn, factor: 2.0}"
    model, _ = ftcore.load(["+model=qwen3", "model.tiny=true", "model.max_length=4096", asked])
    automatic, _ = ftcore.load(["+model=qwen3", "model.tiny=true", "model.max_length=4096"])
    assert automatic.config.rope_parameters == model.config.rope_parameters
    assert model.config.max_position_embeddings == 4096
    assert model.config.rope_parameters["original_max_position_embeddings"] == 2048
    plain, _ = ftcore.load(["+model=qwen3", "model.tiny=true"])
    rotary, other = (next(m for m in x.modules() if "RotaryEmbedding" in type(m).__name__) for x in (model, plain))
    assert not torch.equal(rotary.inv_freq, other.inv_freq)


def test_a_folder_that_holds_a_run_is_refused(tiny_run) -> None:
    tiny_run("output_dir=one")
    before = Path("one/run.json").read_text()
    with pytest.raises(ftcore.Refused, match="already holds a run"):
        tiny_run("output_dir=one")
    assert Path("one/run.json").read_text() == before


def test_a_resumed_run_keeps_what_it_is(tiny_run) -> None:
    tiny_run("output_dir=one", "trainer.save_steps=1")
    before = Path("one/config.yaml").read_text()
    with pytest.raises(ftcore.Refused, match=r"adapter\.r: was 16 when the run began, and is 8"):
        tiny_run("output_dir=one", "resume=last", "adapter.r=8", "trainer.max_steps=3")
    with pytest.raises(ftcore.Refused, match="has done 2 steps already"):
        tiny_run("output_dir=one", "resume=last")
    assert Path("one/config.yaml").read_text() == before
    assert tiny_run("output_dir=one", "resume=last", "trainer.max_steps=3", "trainer.save_steps=1").metrics["eval_loss"]


def test_grpo_evaluates_whole_groups(in_tmp: Path) -> None:
    words = [
        "+model=qwen3",
        "model.tiny=true",
        "+trainer=grpo",
        "trainer.max_steps=1",
        "trainer.max_completion_length=4",
    ]
    result = ftcore.run([*words, "trainer.global_batch=12", "data.eval_size=3"])
    assert "eval_reward" in result.metrics


def test_a_wrapper_alone_is_no_reward(in_tmp: Path) -> None:
    @ftcore.hookimpl(wrapper=True)
    def ftcore_rewards():
        return (yield)

    words = [
        "+model=qwen3",
        "model.tiny=true",
        "+trainer=grpo",
        "trainer.max_steps=1",
        "trainer.max_completion_length=4",
    ]
    result = ftcore.run(words, plugins=[ftcore_rewards])
    assert "rewards/length/mean" in metrics_of(result.output_dir)[0], "the sample's reward is still selected"


def test_memory_least_holds_for_loaded_models_too() -> None:
    """Once: within the layers that a kernel took over, around the others."""
    words = ["+model=qwen3", "model.tiny=true"]
    kept, checkpointed = {}, {}
    for kernels in ("kernels=[auto]", "kernels=[]"):
        for mode in ("memory=least", "memory=off"):
            model, _ = ftcore.load([*words, kernels, mode])
            kept[kernels, mode] = bytes_kept(model)
            checkpointed[kernels, mode] = model.is_gradient_checkpointing
        assert kept[kernels, "memory=least"] < kept[kernels, "memory=off"]
    assert [case for case, is_checkpointed in checkpointed.items() if is_checkpointed] == [
        ("kernels=[]", "memory=least")
    ]


@pytest.mark.parametrize(
    ("name", "text", "trained"),
    [
        ("rows.csv", "instruction,output\nzip,01001\nnone,None\nna,NA\n", ["01001", "None", "NA"]),
        ("rows [1].jsonl", '{"instruction": "when", "output": "2024-01-02T00:00:00Z"}\n', ["2024-01-02T00:00:00Z"]),
        ("nan.jsonl", '{"instruction": "a", "output": "b", "w": NaN}\n', ["b"]),
    ],
)
def test_what_is_checked_is_what_is_trained(in_tmp: Path, capsys, name: str, text: str, trained: list[str]) -> None:
    from ftcore import cli

    (in_tmp / name).write_text(text)
    code = cli.run(["preview", "+model=qwen3", "model.tiny=true", "+trainer=sft", f"data.path='{name}'"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    for answer in trained:
        assert f"[[{answer}<|im_end|>]]" in printed.out


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_trained_half_of_tied_weights_is_merged_as_trained(in_tmp: Path, module: str) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = ftcore.load(["+model=smollm2", "model.tiny=true", f"adapter.modules_to_save=[{module}]"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    (artifact,) = ftcore.export(model, tokenizer, ["+export=[safetensors]", "export.safetensors.dtype=float32"])
    merged = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    batch = tokenizer("some words", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        assert (model(**batch).logits - merged(**batch).logits).abs().max() < 1e-5
