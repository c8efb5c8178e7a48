"""A run that goes on ends, bit for bit, as one that was never stopped: weights, optimizer, generators, place, metrics.

Every trainer plugin is in the default suite once, stopped in the middle of a pass over the data, between two lines of
the log and, where one rollout serves several steps, within a rollout. The whole matrix is `slow`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ftcore
from ftcore.catalog import installed
from ftcore.hooks import hookimpl
from ftcore.testing import runs
from ftcore.training_checkpoint import manifest

STEPS = 4
COMMON = (
    *("kernels=[]", "prompts=[]", f"trainer.max_steps={STEPS}", "trainer.save_steps=1", "trainer.logging_steps=2"),
    *("trainer.max_length=96", "model.tiny=true", "model.dtype=float32"),
)
COMPLETIONS = ("trainer.max_completion_length=6",)


@dataclass(frozen=True)
class Row:
    """What a trainer is tried with."""

    words: tuple[str, ...] = ()
    model: str = "llama"
    rows: int = 4
    """Rows of the shipped sample: less than the steps take, so that the last ones are of a second pass. 0: all."""
    batch: tuple[int, int] = (2, 1)
    streams: bool = True
    packs: bool = False


GROUPS = (*COMPLETIONS, "trainer.num_generations=2", "trainer.args.num_iterations=2")
TRAINERS = {
    "classify": Row(model="modernbert"),
    "cpt": Row(packs=True),
    "dpo": Row(),
    "embed": Row(model="bert", batch=(2, 2)),
    "gkd": Row((*COMPLETIONS, "trainer.lmbda=0.5")),
    "grpo": Row(GROUPS, rows=1),
    "kto": Row(rows=8, batch=(4, 2)),
    "online_dpo": Row(COMPLETIONS),
    "orpo": Row(streams=False),
    "ppo": Row((*COMPLETIONS, "trainer.num_mini_batches=2", "trainer.num_ppo_epochs=2"), streams=False),
    "reward": Row(),
    "rloo": Row(GROUPS, rows=1),
    "sft": Row(packs=True),
    "simpo": Row(streams=False),
    "speech": Row(model="whisper", rows=0),
    "tts": Row(model="csm", rows=0),
}
ADAPTERS = {"lora": (), "full": ("adapter=full",), "qlora": ("+quantizer=bnb_nf4",)}
READING = {"map": (), "streaming": ("data.streaming=true",), "packed": ("trainer.packing=true",)}


class VariedReward:
    """Completions are worth something that depends on each of their bytes, so that there is something to learn."""

    @hookimpl
    def ftcore_rewards(self) -> list[Any]:
        """One reward."""

        def varied(completions: list[Any], **_: Any) -> list[float]:
            return [float(sum(map(ord, said[0]["content"])) % 7) for said in completions]

        return [varied]


def words_of(trainer: str, place: Path, *more: str) -> list[str]:
    """The overrides of a trainer's run, with a few of the shipped rows in a file of their own."""
    row = TRAINERS[trainer]
    words = [f"+model={row.model}", f"+trainer={trainer}", *COMMON, *row.words]
    words += [f"trainer.global_batch={row.batch[0]}", f"trainer.micro_batch={row.batch[1]}"]
    if row.rows:
        form = runs.prepared(words)[1].format
        assert form is not None
        with Path(form.sample).open(encoding="utf-8") as sample:
            (place / "rows.jsonl").write_text("".join(islice(sample, row.rows)), encoding="utf-8")
        words.append(f"data.path='{place / 'rows.jsonl'}'")
    return [*words, *more]


def gone_on(place: Path, words: list[str], *stops: int) -> dict[int, list[Any]]:
    """For each of the steps `stops`: what a run that went on from there has otherwise than the unbroken one."""
    wanted = TRAINERS[next(word for word in words if word.startswith("+trainer=")).partition("=")[2]]
    plugins = [VariedReward()] if wanted.words[:1] == COMPLETIONS else []
    ftcore.run([*words, f"output_dir='{place / 'whole'}'"], plugins=plugins)
    whole = place / "whole" / "checkpoints"
    found = {}
    for stop in stops:
        broken = place / f"from-{stop}" / "checkpoints"
        shutil.copytree(whole / f"checkpoint-{stop}", broken / f"checkpoint-{stop}")
        ftcore.run([*words, f"output_dir='{broken.parent}'", "resume=last"], plugins=plugins)
        found[stop] = differences(whole / f"checkpoint-{STEPS}", broken / f"checkpoint-{STEPS}")
    return found


def differences(one: Path, other: Path) -> list[Any]:
    """Files of two checkpoints whose bytes differ, and lines of their logs whose numbers do."""
    first, second = digests(one), digests(other)
    files: list[Any] = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    return files + [(a, b) for a, b in zip(log_of(one), log_of(other), strict=True) if a != b]


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file but transformers' own state, which says how long a step took."""
    files = manifest.about(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "trainer_state.json"}


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of the log without times."""
    lines = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    timed = ("time", "runtime", "second")
    return [{name: value for name, value in line.items() if not any(t in name for t in timed)} for line in lines]


def test_every_trainer_has_a_row() -> None:
    assert sorted(TRAINERS) == sorted(installed().names("trainer"))


@pytest.mark.parametrize(
    "trainer", [n if n in ("sft", "dpo", "grpo", "tts") else pytest.param(n, marks=pytest.mark.slow) for n in TRAINERS]
)
def test_a_run_that_goes_on_is_the_unbroken_run(trainer: str, tmp_path: Path) -> None:
    assert gone_on(tmp_path, words_of(trainer, tmp_path), 3) == {3: []}


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_vl", "mllama", "deepseek_v3"))]
)
def test_weights_that_are_published_under_other_names_are_read_back(family: str, tmp_path: Path) -> None:
    words = words_of("sft", tmp_path, "adapter=full")
    assert gone_on(tmp_path, [f"+model={family}", *words[1:]], 1) == {1: []}


@pytest.mark.parametrize("trainer", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [2, 3], ids=["between rollouts", "within a rollout"])
def test_a_rollout_is_learnt_from_as_before_by_other_micro_batches(trainer: str, stop: int, tmp_path: Path) -> None:
    words = words_of(trainer, tmp_path, "trainer.global_batch=4", "trainer.optimizer=sgd", "trainer.learning_rate=1.0")
    words = [word for word in words if not word.startswith("trainer.micro_batch=")]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say a."}\n{"prompt": "Say b."}\n', encoding="utf-8")
    ftcore.run([*words, "trainer.micro_batch=4", f"output_dir='{tmp_path / 'whole'}'"], plugins=[VariedReward()])
    whole, broken = tmp_path / "whole" / "checkpoints", tmp_path / "broken" / "checkpoints"
    shutil.copytree(whole / f"checkpoint-{stop}", broken / f"checkpoint-{stop}")
    more = ["trainer.micro_batch=2", f"output_dir='{broken.parent}'", "resume=last"]
    ftcore.run([*words, *more], plugins=[VariedReward()])
    one, other = (load_file(place / f"checkpoint-{STEPS}" / "adapter_model.safetensors") for place in (whole, broken))
    before = load_file(whole / f"checkpoint-{stop}" / "adapter_model.safetensors")
    assert max(float((one[name] - before[name]).abs().max()) for name in one) > 1e-4
    if stop == 2:  # within one, another is drawn
        for name, weight in one.items():
            assert torch.allclose(weight, other[name], atol=1e-5), name


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path: Path) -> None:
    class Kept:
        @hookimpl(wrapper=True)
        def ftcore_make_trainer(self):
            self.trainer = yield
            return self.trainer

    kept, words = Kept(), words_of("sft", tmp_path, "adapter=full", "trainer.max_steps=1")
    ftcore.run(["+model=qwen3_moe", *words[1:], f"output_dir='{tmp_path / 'run'}'"], plugins=[kept])
    kept.trainer.model.save_pretrained(tmp_path / "published")
    with pytest.raises(ftcore.Refused, match=r"does not have 2 of the model's weights, such as .*experts"):
        kept.trainer._load_from_checkpoint(str(tmp_path / "published"))


def allowed(row: Row, reading: str) -> bool:
    return {"map": True, "streaming": row.streams, "packed": row.packs}[reading]


@pytest.mark.slow
@pytest.mark.parametrize("reading", READING)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_whole_matrix(trainer: str, adapter: str, reading: str, tmp_path: Path) -> None:
    if (adapter, reading) == ("lora", "map"):
        pytest.skip("in the default suite")
    words = words_of(trainer, tmp_path, *ADAPTERS[adapter], *READING[reading])
    if allowed(TRAINERS[trainer], reading):
        assert gone_on(tmp_path, words, 3) == {3: []}
        return
    refused = runs.refusals(words)
    assert refused
    assert all(problem.key and problem.message and problem.fix for problem in refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("trainer.args.dataloader_num_workers=2",),
        ("trainer.args.dataloader_num_workers=2", "data.streaming=true"),
        ("trainer.packing=true", "data.streaming=true"),
        ("data.eval_size=1", "trainer.eval_steps=1"),
        ("trainer.optimizer=adamw_8bit", "adapter.dropout=0.1"),
        ("trainer.schedule=cosine", "trainer.warmup=2", "trainer.max_grad_norm=0.1"),
    ],
)
def test_stopped_within_and_after_a_pass_and_after_an_evaluation(more: tuple[str, ...], tmp_path: Path) -> None:
    assert gone_on(tmp_path, words_of("sft", tmp_path, *more), 1, 2, 3) == {1: [], 2: [], 3: []}
