"""What a run holds on a GPU at all times: weights, and gradients and moments of those that are trained.

From the model without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftcore.catalog import installed
from ftcore.memory import host_weights_of, optimizer_bytes, width_of, writes
from ftcore.specs import Passes, Plan, Recomputing

BITS = "bits_per_weight"
"""Function of a quantizer's module: from its config to the bits that a frozen weight takes, scales included."""


@dataclass(frozen=True)
class Held:
    """Of a run whose model, adapter and kernels are there without weights; in bytes, but for `trained` and `bits`."""

    plan: Plan
    model: Any
    layers: Sequence[Recomputing]
    passes: Passes

    @property
    def fixed(self) -> int:
        """Weights, gradients and the optimizer's moments."""
        return self.weights + self.gradients + self.moments

    @cached_property
    def weights(self) -> int:
        """Of all weights, and of a reference model's copy of those that are trained."""
        inside = {
            id(parameter) for module in self._whole_layers for parameter in module.parameters() if parameter.ndim == 2
        }
        frozen = 0.0
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                frozen += parameter.numel() * (self.bits / 8 if id(parameter) in inside else self.width)
        copies = 2 if self._copied else 1
        return int(frozen) + copies * self.trained * self.trained_width

    @property
    def gradients(self) -> int:
        """As wide as the weights."""
        return self.trained * self.trained_width

    @property
    def moments(self) -> int:
        """The optimizer's state."""
        return self.trained * self.state_bytes

    @cached_property
    def leaving(self) -> tuple[int, int]:
        """The embedding and the head, of what `offload` leaves in host memory."""
        embedding = head = 0
        for weights in host_weights_of(self.model):
            if (parameter := weights.embedding()) is not None:
                embedding += self.width * parameter.numel()
            if (parameter := weights.head()) is not None and not writes(self.plan):
                head += self.width * parameter.numel()
        return embedding, head

    # ------------------------------------------------------------------------------------------------- of one weight

    @property
    def width(self) -> int:
        """Of a weight as the model was loaded."""
        assert self.plan.run.model is not None
        return width_of(self.plan.run.model.dtype)

    @property
    def trained_width(self) -> int:
        """Of a trained weight: an adapter's matrices are in 32 bits, other weights as the model is."""
        return 4 if self.adapted else self.width

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's state for a trained weight."""
        return optimizer_bytes(self.plan, self.trained_width)

    @cached_property
    def bits(self) -> float:
        """Of a frozen weight in the layers, scales included."""
        quantizer = self.plan.run.quantizer
        if quantizer is None:
            return 8 * self.width
        of_weight = getattr(installed().find("quantizer", quantizer.name).load(), BITS, None)
        return float(of_weight(quantizer)) if of_weight else 8 * self.width

    # --------------------------------------------------------------------------------------------------- of the model

    @property
    def adapted(self) -> bool:
        """Whether an adapter is what is trained."""
        return hasattr(self.model, "peft_config")

    @cached_property
    def trained(self) -> int:
        """Weights that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @cached_property
    def dequantized(self) -> int:
        """Of a layer's weights as wide as what is computed, where they are made of 4 bits for a while.

        The layers do not know: without weights they are plain.
        """
        if self.bits >= 8:
            return 0
        of_layers = (
            sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and "lora_" not in name)
            for module in self._whole_layers
        )
        return self.width * int(max(of_layers))

    @property
    def head_weights(self) -> int:
        """Of the head, tied to the embedding or not."""
        return self.width * int(self.text.vocab_size) * int(self.text.hidden_size)

    @cached_property
    def head_gradient(self) -> int:
        """Of the gradient of the head, where it is trained; while it is summed in 32 bits it takes twice as much."""
        weight = getattr(self.model.get_output_embeddings(), "weight", None)
        return 0 if weight is None or not weight.requires_grad else self.trained_width * weight.numel()

    @property
    def text(self) -> Any:
        """The config of the decoder."""
        return self.model.config.get_text_config()

    @property
    def _copied(self) -> bool:
        """Whether a reference model has a copy of what is trained; without its adapter it needs none."""
        trainer = self.plan.trainer
        return trainer is not None and trainer.reference_model and self.passes.unlearnt > 0 and not self.adapted

    @property
    def _whole_layers(self) -> Iterator[Any]:
        return (module for module in self.model.modules() if hasattr(module, "ftcore_recompute"))
