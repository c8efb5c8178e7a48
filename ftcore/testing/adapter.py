"""What an adapter keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class AdapterContract(PluginContract):
    """An adapter starts where the model is, trains what it should and only that, and comes back from disk."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select the model that it is tried on."""
    start_tolerance: ClassVar[float] = 1e-5
    """Relative distance of the adapted model's logits from the model's before any training."""

    def overrides(self) -> list[str]:
        """Model and adapter."""
        return [*self.base, *self.selected()]

    def test_starts_where_the_model_is(self) -> None:
        """Before training, the adapter changes nothing that the model says."""
        plain = runs.loaded([*self.base, "adapter=full"])
        maths.assert_same_logits(runs.loaded(self.overrides()), plain, self.start_tolerance)

    def test_a_step_trains_the_adapter_and_nothing_else(self) -> None:
        """What requires a gradient gets one and moves; the rest stays as it was, bit by bit."""
        import torch

        model: Any = runs.loaded(self.overrides()).model
        runs.shake(model, trainable_only=True)  # LoRA's A has no gradient while B is 0
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        assert trained, "nothing would be trained"
        loss, gradients = maths.loss_and_gradients(model, runs.batch_for(model))
        assert loss.isfinite()
        assert set(gradients) == set(trained)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        now = dict(model.named_parameters())
        assert [name for name, was in trained.items() if torch.equal(now[name], was)] == []
        assert [name for name, was in frozen.items() if not torch.equal(now[name], was)] == []

    def test_saved_and_loaded_says_the_same(self, tmp_path: Path) -> None:
        """What a run saves gives the same logits when it is loaded again."""
        first = runs.loaded(self.overrides())
        model: Any = first.model
        runs.shake(model, trainable_only=True)
        model.save_pretrained(tmp_path / "trained")
        first.tokenizer.save_pretrained(tmp_path / "trained")
        maths.assert_same_logits(runs.reloaded(self.overrides(), str(tmp_path)), first, 1e-6)
