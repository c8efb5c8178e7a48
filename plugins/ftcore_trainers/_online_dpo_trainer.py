"""TRL's OnlineDPOTrainer with ftcore's generator in place of its own generation, and a fused head, which it has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from ftcore_trainers._experimental import experimental
from ftcore_trainers._fused_head import base_of, take_over
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._rollouts import completed, padded, prompt_ids, sampling_of, weights_changed

with experimental():
    from trl.experimental.online_dpo import OnlineDPOTrainer

if TYPE_CHECKING:
    from ftcore.specs import Generator
    from ftcore_trainers._reference import Reference


class GeneratorOnlineDPOTrainer(LeanLoop, OnlineDPOTrainer):
    """Two completions for each prompt, the better one of which is chosen; the loss and its metrics are TRL's."""

    repeatable = False

    def __init__(self, generator: Generator, reference: Reference, **kwargs: Any) -> None:
        super().__init__(ref_model=reference, **kwargs)
        add_fused_lm_head(base_of(self.model))
        take_over(self)
        self._generator = generator
        self._said: list[list[int]] = []
        self.add_callback(weights_changed(generator))

    def _generate(self, model: Any, prompts: list[Any], images: Any = None) -> tuple[Any, ...]:
        """Token ids and masks of prompts and completions, the first ones of all prompts before the second ones."""
        if images is not None:
            raise NotImplementedError("the generator completes text prompts only")
        asked = [prompt_ids(self.processing_class, prompt) for prompt in prompts] * 2
        self._said = completed(self._generator, asked, sampling_of(self.args, self.args.max_new_tokens)).ids
        pad, device = self.processing_class.pad_token_id, self.args.device
        return (*padded(asked, pad, device, left=True), *padded(self._said, pad, device), None)

    def _calculate_rewards_from_functions(
        self, prompts: Any, completions: Any, completion_ids_list: Any, **columns: Any
    ) -> Tensor:
        """TRL's, given the tokens without their padding."""
        total: Tensor = super()._calculate_rewards_from_functions(prompts, completions, self._said, **columns)
        return total

    def _forward(
        self,
        model: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        vision_inputs: Any = None,
    ) -> Tensor:
        """Log-probabilities of the completions' tokens `[rows, tokens]`, 0 in the padding; all logits never exist."""
        width = completion_ids.shape[1]
        start = max(prompt_ids.shape[1] + width - self.max_length, 0)
        ids = torch.cat([prompt_ids[:, start:], completion_ids], dim=1)
        mask = torch.cat([prompt_mask[:, start:], completion_mask], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        logprobs: Tensor = output.log_probs[:, -width:]
        return logprobs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL's, which adds up the gradients of the micro-batches where its loss is their mean."""
        # `accelerator.backward` divides by this; transformers itself leaves it at 1.
        self.accelerator.gradient_accumulation_steps = self.current_gradient_accumulation_steps
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self.accelerator.gradient_accumulation_steps = 1
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the mean score under the name that it has everywhere else."""
        if "objective/scores" in logs:
            logs["reward"] = logs["objective/scores"]
        super().log(logs, *args, **kwargs)
