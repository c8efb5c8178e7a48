"""What a quantizer keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract


class QuantizerContract(PluginContract):
    """A quantized model is smaller, says nearly the same, and can carry an adapter that is trained."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select the model that it is tried on."""
    size: ClassVar[float] = 0.8
    """Bytes of the quantized model, as a part of its bytes in float32; a tiny model is mostly embeddings, which stay."""
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
        plain, ours = runs.loaded([*self.base, "kernels=[]"]), runs.loaded([*self.base, *self.selected(), "kernels=[]"])
        was, now = (model.get_memory_footprint() for model in _models(plain, ours))
        assert now < self.size * was, f"{now} bytes of {was}"
        batch = runs.batch_for(plain.model)
        distance = maths.apart(runs.logits_of(ours.model, batch), runs.logits_of(plain.model, batch))
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


def _models(*loaded: Any) -> list[Any]:
    return [each.model for each in loaded]
