"""What an extra keeps to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar

from ftcore.testing import runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ftcore.specs import RunResult


class ExtraContract(PluginContract):
    """An extra watches a run and does not get in its way."""

    base: ClassVar[Sequence[str]] = (*runs.TINY, *runs.SHORT, "+trainer=sft", "trainer.max_steps=2")
    """Overrides of the run that it watches."""

    def after_run(self, run_dir: Path) -> None:
        """Called once the run is done; override it to look at what the extra wrote."""

    def test_callbacks_are_callbacks(self, tmp_path: Path) -> None:
        """What the plugin hands to the trainer is of transformers' kind."""
        from transformers import TrainerCallback

        from ftcore import hooks as h

        hooks, plan = runs.prepared([*self.base, *self.selected(), f"output_dir='{tmp_path / 'run'}'"])
        assert all(isinstance(callback, TrainerCallback) for callback in hooks.collect(h.ftcore_callbacks, plan=plan))

    def test_run_goes_through(self, run_dir: Path) -> None:
        """A run with the extra ends well, with the same losses as one without."""
        from ftcore.api import run

        plain = run([*self.base, f"output_dir='{run_dir}-plain'"])
        watched = run([*self.base, *self.selected(), f"output_dir='{run_dir}'"])
        assert json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["status"] == "done"
        assert _losses(watched) == _losses(plain)
        self.after_run(run_dir)


def _losses(result: RunResult) -> dict[str, float]:
    """The evaluation's among them: it is not rounded, so that it tells the smallest interference."""
    return {name: value for name, value in result.metrics.items() if "loss" in name}
