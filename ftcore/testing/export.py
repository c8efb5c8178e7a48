"""What an exporter keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftcore.specs import Artifact, Loaded
from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn


class ExportContract(PluginContract):
    """An exporter writes into the run folder, leaves the model as it was, and what it wrote is the model."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select the model that is exported."""
    tolerance: ClassVar[float] = 1e-5
    """Relative distance, in norm, of the logits of what was written from the model's."""

    def reload(self, artifact: Artifact, loaded: Loaded) -> nn.Module | None:
        """The model that the artifact holds, made from the artifact; override it to have its logits compared."""
        return None

    def exported(self, run_dir: Path) -> tuple[list[Artifact], Loaded]:
        """A tiny model with an adapter that does something, exported."""
        from ftcore import pipeline

        hooks, plan = runs.prepared([*self.base, *self.selected(), f"output_dir='{run_dir}'"])
        loaded = pipeline.load(hooks, plan)
        runs.shake(loaded.model, trainable_only=True)
        return pipeline.export(hooks, loaded), loaded

    def test_artifacts_are_there(self, tmp_path: Path) -> None:
        """Each one exists under the run folder, has bytes in it, and says how many; nothing half-written is left."""
        artifacts, _ = self.exported(tmp_path / "run")
        assert artifacts
        for artifact in artifacts:
            assert artifact.path.resolve().is_relative_to((tmp_path / "run").resolve())
            assert artifact.path.exists()
            assert artifact.size == Artifact.of(artifact.target, artifact.path).size > 0
        assert [path.name for path in (tmp_path / "run").rglob(".*")] == []

    def test_writing_twice_replaces(self, tmp_path: Path) -> None:
        """A second export into the same folder gives the same artifacts, not an error and not a second copy."""
        first = self.exported(tmp_path / "run")[0]
        files = sorted(path for path in (tmp_path / "run").rglob("*"))
        second = self.exported(tmp_path / "run")[0]
        assert [a.path for a in second] == [a.path for a in first]
        assert sorted(path for path in (tmp_path / "run").rglob("*")) == files

    def test_model_is_left_as_it_was(self, tmp_path: Path) -> None:
        """No weight, no dtype and no mode of the model changes."""
        import torch

        from ftcore import pipeline

        hooks, plan = runs.prepared([*self.base, *self.selected(), f"output_dir='{tmp_path / 'run'}'"])
        loaded = pipeline.load(hooks, plan)
        runs.shake(loaded.model, trainable_only=True)
        loaded.model.train()
        before = {name: value.detach().clone() for name, value in loaded.model.state_dict().items()}
        trainable = [p.requires_grad for p in loaded.model.parameters()]
        pipeline.export(hooks, loaded)
        after = loaded.model.state_dict()
        assert after.keys() == before.keys()
        assert [n for n in before if after[n].dtype != before[n].dtype or not torch.equal(after[n], before[n])] == []
        assert [p.requires_grad for p in loaded.model.parameters()] == trainable
        assert loaded.model.training

    def test_what_was_written_is_the_model(self, tmp_path: Path) -> None:
        """The artifact, loaded again by `reload`, says what the model says."""
        artifacts, loaded = self.exported(tmp_path / "run")
        model: Any = self.reload(artifacts[0], loaded)
        if model is None:
            pytest.skip("override `reload` to compare the artifact's logits")
        batch = runs.batch_for(loaded.model)
        logits = runs.logits_of(model, {name: value.to(model.device) for name, value in batch.items()})
        assert maths.apart(logits, runs.logits_of(loaded.model, batch)) <= self.tolerance
