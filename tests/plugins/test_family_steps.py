"""One step of every family's tiny model by its own trainer: in bf16 on a GPU, and a few on the CPU in fp32.

Which numbers are right is the model contract's business, in fp32. Here the trainer's own batches, autocast, fused head
and the GPU's kernels come together: nothing overflows, nothing is cut off, and the loss and the gradient as a whole are
those of no kernels at all.
"""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.catalog import installed
from ftcore.errors import Refused
from ftcore.specs import TrainerSpec
from ftcore.testing import maths, runs

FAMILIES = [option.name for option in installed().options("model") if option.dist == "ftcore"]
ON_CPU = ("bert", "qwen3_moe", "qwen3_vl", "whisper")
"""One for each kind of input: a label, text, text with images, a recording."""
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 1e-1)}
"""Relative distance of the losses, and in norm of the gradients as a whole, with kernels from those without.

Kernels round at other places, each time by up to 4e-3 in bf16; on a CPU, 9e-4 and 2e-2 were seen of all families.
"""
NOTHING = 1e-7
"""Part of the whole gradient's norm that the gradient of a parameter has at least: less is rounding."""
SHORT = ("trainer.max_steps=1", "trainer.global_batch=4", "trainer.micro_batch=4")


def words_for(name: str, folder: Path) -> list[str]:
    """The tiny model, on rows with images if it sees, by SFT, or else the trainer of its own head or of a new one."""
    words = [f"+model={name}", "model.tiny=true", *SHORT]
    family = runs.prepared(words[:2])[1].family
    words += ["data=images", f"data.path='{pictures(folder)}'"] if family.vision else []
    words += ["data=audio", f"data.path='{recordings(folder)}'"] if "ToWaveform" in family.auto_class else []

    def spec(trainer: str) -> TrainerSpec | None:
        with suppress(Refused):
            return runs.prepared([*words, f"+trainer={trainer}"])[1].trainer
        return None

    if spec("sft"):
        return [*words, "+trainer=sft"]
    taken = {name: found for name in installed().names("trainer") if (found := spec(name))}
    assert taken, f"no trainer takes {name}"
    return [*words, f"+trainer={min(taken, key=lambda name: taken[name].auto_class != family.auto_class)}"]


def pictures(folder: Path) -> Path:
    """Rows with a picture each; attention has no gradient on the shipped ones, whose patches are all of one colour."""
    rows = []
    for n, answer in enumerate(("Noise.", "Noise again.", "And again.", "The last.")):
        runs.noise(64 + 8 * n, 96).save(folder / f"{n}.png")
        question = {"role": "user", "content": "<image>What is this?"}
        rows.append({"images": [f"{n}.png"], "messages": [question, {"role": "assistant", "content": answer}]})
    return written(rows, folder)


def recordings(folder: Path) -> Path:
    """Rows of a quarter of a second of noise at the 24 kHz of codecs; the shipped ones are for listeners, at 16 kHz."""
    rows = [{"audio": f"{n}.wav", "text": f"Noise {n}."} for n in range(4)]
    for n, row in enumerate(rows):
        samples = torch.randint(-9000, 9000, (6000,), generator=torch.Generator().manual_seed(n), dtype=torch.int16)
        with wave.open(str(folder / row["audio"]), "wb") as sound:
            sound.setparams((1, 2, 24_000, 0, "NONE", ""))
            sound.writeframes(samples.numpy().tobytes())
    return written(rows, folder)


def written(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


class Gradients(TrainerCallback):
    """The gradient of every trainable parameter, at the moment at which the optimizer would take it."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None] == []
        self.found = {name: p.grad.detach().double().cpu() for name, p in trained.items()}

    def whole(self) -> torch.Tensor:
        """All of them in one vector."""
        assert self.found, "the optimizer was never reached"
        return torch.cat([gradient.flatten() for gradient in self.found.values()])


class Step:
    """A trainer as a run makes it, with no adapter at zero, and what its one step came to."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.hooks, self.plan = runs.prepared([*words, f"output_dir='{folder}'"])
        folder.mkdir()
        tokenizer = self.hooks.first(h.ftcore_load_tokenizer, plan=self.plan)
        rows = self.hooks.first(h.ftcore_load_dataset, plan=self.plan)
        dataset = self.hooks.first(h.ftcore_format_dataset, plan=self.plan, dataset=rows, tokenizer=tokenizer)
        collator = self.hooks.maybe(h.ftcore_make_collator, plan=self.plan, tokenizer=tokenizer)
        self.loaded, self.gradients = pipeline.load(self.hooks, self.plan, tokenizer), Gradients()
        self.model: Any = self.loaded.model
        runs.shake(self.model, trainable_only=True)
        self.trainer: Any = self.hooks.first(
            h.ftcore_make_trainer,
            plan=self.plan,
            model=self.model,
            tokenizer=tokenizer,
            dataset={"train": dataset["train"]},
            collator=collator,
            rewards=[],
            callbacks=[self.gradients],
            generator=None,
            optimizer=self.hooks.maybe(h.ftcore_make_optimizer, plan=self.plan, model=self.model),
        )

    def loss(self) -> float:
        """Take the step."""
        torch.manual_seed(3)
        self.hooks.first(h.ftcore_train, plan=self.plan, trainer=self.trainer)
        assert self.trainer.state.global_step == 1
        return float(next(entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry))


def assert_a_good_step(name: str, dtype: str, folder: Path) -> None:
    words = [*words_for(name, folder), f"model.dtype={dtype}"]
    ours, plain = Step([*words, "kernels=[auto]"], folder / "auto"), Step([*words, "kernels=[]"], folder / "none")
    assert ours.loaded.patches.claims, "no kernel is on the model, so nothing is tried"
    assert not plain.loaded.patches.claims
    ours.model.load_state_dict(plain.model.state_dict())
    losses = ours.loss(), plain.loss()
    assert all(map(math.isfinite, losses))
    assert ours.gradients.found.keys() == plain.gradients.found.keys()
    for step in (ours, plain):
        gradients, norm = step.gradients.found, step.gradients.whole().norm()
        assert [n for n, gradient in gradients.items() if not gradient.isfinite().all()] == []
        assert [n for n, gradient in gradients.items() if not gradient.norm() > NOTHING * norm] == []
    of_loss, of_gradient = TOLERANCE[dtype]
    assert abs(losses[0] - losses[1]) <= of_loss * abs(losses[1])
    assert maths.apart(ours.gradients.whole(), plain.gradients.whole()) <= of_gradient


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_in_bf16(name: str, tmp_path: Path) -> None:
    assert_a_good_step(name, "bfloat16", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU takes every family")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("bert", "whisper") else ()) for name in ON_CPU]
)
def test_a_step_on_the_cpu(name: str, tmp_path: Path) -> None:
    assert_a_good_step(name, "float32", tmp_path)


def test_every_kind_of_family_is_among_them() -> None:
    assert set(ON_CPU) < set(FAMILIES)
