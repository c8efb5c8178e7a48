"""TRL's GRPOTrainer with ftcore's generator in place of its own generation, and the model's own fused head."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer

from ftcore_trainers._fused_head import take_over
from ftcore_trainers._rollouts import Rollouts
from ftcore_trainers._shared_prompts import SharedPrompts


class GeneratorGRPOTrainer(SharedPrompts, Rollouts, GRPOTrainer):
    """Asks a :class:`ftcore.specs.Generator` for the completions; everything else is TRL's."""

    def __init__(self, share_prompts: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # TRL's own head has what the kernels' has not: a gradient of the entropy, and a head in float32.
        fits = not (self._entropy_bonus_enabled or self.args.cast_lm_head_to_fp32)
        self.share_prompts = fits and take_over(self, temperature=self.temperature) and share_prompts

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = super()._compute_loss(model, inputs)
        return loss * self._part_of_step(inputs) if self.loss_type == "bnpo" else loss

    def weight(self, share: float) -> float:
        """Losses by the tokens of the step are sums already; the others are means over rows."""
        by_tokens = self.loss_type in ("cispo", "dapo", "vespo")
        return 1.0 if by_tokens or (self.loss_type == "bnpo" and self._counts_tokens()) else share

    def _counts_tokens(self) -> bool:
        return not self._entropy_bonus_enabled and not self.aux_loss_enabled

    def _part_of_step(self, inputs: dict[str, Any]) -> Any:
        """Makes the mean over a micro-batch's tokens its part of the mean over those of the optimizer step.

        TRL's `bnpo` is a mean of means, which depends on how the step is split into micro-batches.
        """
        parts, split = self._buffered_inputs, self.current_gradient_accumulation_steps
        if not self.model.training or parts is None or not self._counts_tokens():
            return 1
        first = self._step % self.args.steps_per_generation // split * split
        tokens = sum(part["completion_mask"].sum() for part in parts[first : first + split])
        return inputs["completion_mask"].sum() * split / tokens.clamp(min=1)  # none where all were cut off and left out

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        completions = self.complete(prompt_ids, images)
        return completions.ids, completions.logprobs
