"""What a quantizer keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence


class QuantizerContract(PluginContract):
    """A quantized model is smaller, says nearly the same, and can carry an adapter that is trained."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select the model that it is tried on."""
    size: ClassVar[float] = 0.8
    """Bytes of the quantized model, as a part of its bytes in float32; embeddings stay, and a tiny model has many."""
    error: ClassVar[float] = 0.3
    """Largest relative distance of its logits, in norm, from the model's."""
    needs_gpu: ClassVar[bool] = False
    """Whether it runs on GPUs only."""

    @pytest.fixture(autouse=True)
    def _device(self) -> None:
        import torch

        if self.needs_gpu and not torch.cuda.is_available():
            pytest.skip("needs a GPU")

    def test_weights_are_smaller_and_say_nearly_the_same(self) -> None:
        """Fewer bytes, and an error that is there but bounded."""
        plain: Any = runs.loaded([*self.base, "kernels=[]"]).model
        ours: Any = runs.loaded([*self.base, *self.selected(), "kernels=[]"]).model
        was, now = plain.get_memory_footprint(), ours.get_memory_footprint()
        assert now < self.size * was, f"{now} bytes of {was}"
        batch = runs.batch_for(plain)
        distance = maths.apart(runs.logits_of(ours, batch), runs.logits_of(plain, batch))
        assert 0 < distance < self.error

    def test_an_adapter_over_it_is_trained(self) -> None:
        """One step with LoRA: the loss is finite, the adapter moves, and no quantized weight does."""
        import torch

        model: Any = runs.loaded([*self.base, *self.selected()]).model
        runs.shake(model, trainable_only=True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss, gradients = maths.loss_and_gradients(model, runs.batch_for(model))
        assert loss.isfinite()
        assert all(g.isfinite().all() and g.norm() > 0 for g in gradients.values())
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(gradients)

    def test_answering_between_steps_changes_nothing(self) -> None:
        """A run evaluates and answers prompts before it trains: the gradients afterwards are those of before."""
        model: Any = runs.loaded([*self.base, *self.selected()]).model
        runs.shake(model, trainable_only=True)
        batch = runs.batch_for(model)
        _, before = maths.loss_and_gradients(model, batch)
        runs.logits_of(model, batch)
        _, after = maths.loss_and_gradients(model, batch)
        assert max(maths.apart(after[name], before[name]) for name in before) < 0.02
