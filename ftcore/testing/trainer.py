"""What a trainer keeps to."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftcore.hooks import hookimpl
from ftcore.testing import runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import torch

    from ftcore.specs import RunResult

STEPS = 3


class Watched:
    """A plugin that keeps the trainer, and the weights as they were before training."""

    trainer: Any
    result: RunResult
    before: dict[str, torch.Tensor]

    @hookimpl(wrapper=True)
    def ftcore_make_trainer(self, model: Any) -> Generator[None, Any, Any]:
        """Look at the stage's result."""
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.trainer = yield
        return self.trainer


class TrainerContract(PluginContract):
    """Three steps on the shipped rows: finite, recorded, with nothing switched on behind the plan's back."""

    base: ClassVar[Sequence[str]] = (*runs.TINY, *runs.SHORT)
    """Overrides that select the model that it is tried on."""
    falls: ClassVar[bool] = True
    """Whether the loss must fall within three steps; for reinforcement learning it means nothing."""

    @pytest.fixture(scope="class")
    @classmethod
    def watched(cls, tmp_path_factory: pytest.TempPathFactory) -> Watched:
        """One run that all tests look at."""
        from ftcore.api import run

        watched = Watched()
        folder = tmp_path_factory.mktemp("trainer") / "run"
        words = [*cls.base, *cls().selected(), f"trainer.max_steps={STEPS}", f"output_dir='{folder}'"]
        watched.result = run(words, plugins=[watched])
        return watched

    def test_three_finite_steps(self, watched: Watched) -> None:
        """It takes the steps that it was told to, and every logged loss is a number."""
        assert watched.trainer.state.global_step == STEPS
        losses = [entry["loss"] for entry in watched.trainer.state.log_history if "loss" in entry]
        assert len(losses) == STEPS
        assert all(math.isfinite(loss) for loss in losses)

    def test_loss_falls(self, watched: Watched) -> None:
        """On the held-out rows where there are some, else from the first to the last step."""
        metrics = watched.result.metrics
        pair = ("eval_loss_before", "eval_loss") if "eval_loss_before" in metrics else ("loss_first", "loss_last")
        assert all(math.isfinite(metrics[name]) for name in pair)
        if self.falls:
            assert metrics[pair[1]] < metrics[pair[0]]

    def test_trains_what_is_trainable_and_nothing_else(self, watched: Watched) -> None:
        """Frozen weights are what they were, bit by bit, and in the dtype they had."""
        import torch

        now = dict(watched.trainer.accelerator.unwrap_model(watched.trainer.model).named_parameters())
        frozen = [name for name, was in watched.before.items() if not now[name].requires_grad]
        assert [name for name in frozen if not torch.equal(now[name], watched.before[name])] == []
        assert [name for name, was in watched.before.items() if now[name].dtype != was.dtype] == []
        moved = [name for name, was in watched.before.items() if not torch.equal(now[name], was)]
        assert moved, "no weight moved"

    def test_the_plan_decides_dtype_and_recomputation(self, watched: Watched) -> None:
        """TRL switches bf16 and gradient checkpointing on by default; here `model.dtype` and `memory` decide."""
        arguments = watched.trainer.args
        # transformers 5 is renaming the argument; either name switches it on.
        assert not any(
            getattr(arguments, name, False) for name in ("gradient_checkpointing", "activation_checkpointing")
        )
        assert not any((arguments.bf16, arguments.fp16)), "the tiny model is in float32"
        assert not any(getattr(m, "gradient_checkpointing", False) for m in watched.trainer.model.modules())

    def test_run_is_recorded(self, watched: Watched) -> None:
        """metrics.jsonl has every step, run.json the outcome, and the trained weights are saved."""
        folder = watched.result.output_dir
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len([entry for entry in logged if "loss" in entry]) == STEPS
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "done"
        assert any((folder / "trained").glob("*.safetensors"))
