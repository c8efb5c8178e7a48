"""TRL's GRPOTrainer with ftcore's generator in place of its own generation, and the model's own fused head."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from ftcore import Sampling
from ftcore.specs import Generator
from ftcore_trainers._fused_head import take_over
from ftcore_trainers._lean_loop import LeanLoop


class GeneratorGRPOTrainer(LeanLoop, GRPOTrainer):
    """Asks a :class:`ftcore.specs.Generator` for the completions; everything else is TRL's."""

    def __init__(self, generator: Generator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # TRL's own head has what the kernels' has not: a gradient of the entropy, and a head in float32.
        if not (self._entropy_bonus_enabled or self.args.cast_lm_head_to_fp32):
            take_over(self, temperature=self.temperature)
        self._generator = generator
        self.add_callback(_WeightsChanged(generator))

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if images:
            raise NotImplementedError("the generator completes text prompts only")
        args = self.args
        sampling = Sampling(
            max_new_tokens=self.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            min_p=args.min_p or 0.0,
            repetition_penalty=args.repetition_penalty,
        )
        self._generator.begin_rollout()
        try:
            # TRL repeats each prompt once per completion of its group already.
            completions = self._generator.generate(prompt_ids, sampling)
        finally:
            self._generator.end_rollout()
        return completions.ids, completions.logprobs


class _WeightsChanged(TrainerCallback):
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._generator.weights_changed()
