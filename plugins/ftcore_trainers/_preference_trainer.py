"""What the trainers on preferences do otherwise than TRL's: the model's own head, and no mask where none is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftcore.memory import layers_that_choose
from ftcore_trainers._collator import causal
from ftcore_trainers._fused_head import take_over
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._reference import Reference
from ftcore_trainers._rows_kept import say_dropped


class PreferenceTrainer(LeanLoop):
    """A base to put before a trainer of TRL's whose batches are padded on the right."""

    _masked = True

    def _choose_mask(self) -> None:
        """Where whole-layer kernels are, pads on the right need no mask, which would cost attention its fast kernels.

        A router's loss counts tokens by it.
        """
        ours = causal(self.model.config) and layers_that_choose(self.model)
        self._masked = not ours or bool(getattr(self, "aux_loss_enabled", False))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, which calls the model and asks it for nothing else."""
        return super().compute_loss(  # type: ignore[misc]
            self._callable(model), inputs, return_outputs, num_items_in_batch
        )

    def _callable(self, model: Any) -> Callable[..., Any]:
        """The model, called without a mask where none is needed."""
        return model if self._masked else _unmasked(model)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        made = super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # type: ignore[misc]
        say_dropped(dataset_name, dataset, made, args.max_length)
        return made


class ReferredTrainer(PreferenceTrainer):
    """A base to put before a trainer of TRL's with a reference model.

    :param reference: The reference model, or None where all its log-probabilities are computed before training.
    """

    ref_model: Any

    def __init__(self, reference: Reference | None, **kwargs: Any) -> None:
        self._reference = reference
        super().__init__(ref_model=reference, **kwargs)  # type: ignore[call-arg]
        self._use_own_head()

    def _use_own_head(self) -> None:
        """After TRL has put its head on both models: the reference answers through the policy, with the policy's."""
        self._choose_mask()
        # TRL's head has what the kernels' has not: what WPO weighs pairs by.
        if not getattr(self.args, "use_weighting", False):
            take_over(self, mean_logits=True)
        if self._reference is not None:
            self._reference.masked = self._masked
            vars(self._reference).pop("forward", None)
            models = self.accelerator._models
            models[:] = [model for model in models if model is not self._reference]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._use_own_head()  # TRL's constructor asks for them at its end
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]


def _unmasked(model: Any) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        inputs.pop("attention_mask", None)
        return model(**inputs)

    return call
