"""TRL's GKDTrainer with ftcore's generator, and a divergence that is computed a chunk of tokens at a time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftcore import Sampling
from ftcore_kernels.layers.lm_head_parts import logit_form, rows_of_logits
from ftcore_trainers._experimental import experimental
from ftcore_trainers._fused_head import base_of
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._rollouts import completed, hidden_states, padded, weights_changed

with experimental():
    from trl.experimental.gkd import GKDTrainer

if TYPE_CHECKING:
    from ftcore.specs import Generator

IGNORED = -100


class DistillationCollator:
    """Rows of token ids and labels, padded on the right; what stands before the first label is the prompt."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels` `[rows, length]`, and `prompt_ids` as lists."""
        ids, mask = padded([row["input_ids"] for row in rows], self._pad, "cpu")
        labels, _ = padded([row["labels"] for row in rows], IGNORED, "cpu")
        prompts = [row["input_ids"][: _prompt_length(row["labels"])] for row in rows]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_ids": prompts}


class ChunkedGKDTrainer(LeanLoop, GKDTrainer):
    """The mixture of rows and the policy's own completions is TRL's, and so is the divergence, of a chunk."""

    def __init__(self, generator: Generator, max_completion_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._generator, self._longest = generator, max_completion_length
        self.add_callback(weights_changed(generator))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """With probability `lmbda`, learn from the policy's own completions of the prompts instead of the rows."""
        prompts = inputs["prompt_ids"]
        if random.random() < self.lmbda:
            inputs = self._own_completions(prompts)
        # Where completions may be the policy's own, the tokens of a step are not known before it: each micro-batch is
        # a mean of its own then.
        number = num_items_in_batch if self.lmbda == 0 else None
        return super().training_step(model, inputs, number)

    def _one_pass(self, model: Any, inputs: Any, items: Any) -> Tensor:
        inputs.pop("prompt_ids", None)
        loss: Tensor = super(GKDTrainer, self).training_step(model, inputs, items)
        return loss

    @property
    def repeatable(self) -> bool:
        """Own completions would be others."""
        return bool(self.lmbda == 0)

    def whole(self, inputs: Any) -> str:
        """Where completions may be the policy's own, the loss is a mean over the tokens of the micro-batch."""
        return "" if self.lmbda == 0 else "its loss is a mean over the tokens of completions (trainer.lmbda > 0)"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The generalised Jensen-Shannon divergence of the next-token distributions, over the supervised tokens."""
        if return_outputs:
            raise NotImplementedError("the logits of a batch never exist")
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        rows = torch.nonzero(inputs["labels"][:, 1:].reshape(-1) != IGNORED).squeeze(1)
        with torch.no_grad():
            theirs = _states(self.teacher_model, self.teacher_model, given)[rows]
        mine = _states(model, base_of(self.model), given)[rows]
        total = mine.new_zeros((), dtype=torch.float32)
        size = rows_of_logits(self.teacher_model.get_output_embeddings().weight.shape[0])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            total = total + checkpoint(self._divergence, mine[part], theirs[part], use_reentrant=False)
        if num_items_in_batch is None:
            return total / max(len(rows), 1)
        # The number is of all processes where it is averaged over them, and their gradients are averaged as well.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * processes / num_items_in_batch

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The divergence on held-out rows."""
        inputs = {name: value for name, value in inputs.items() if name != "prompt_ids"}
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Sum over a chunk of tokens `[n, width]`, each of its own model's."""
        student, teacher = _logits(base_of(self.model), mine), _logits(self.teacher_model, theirs)
        loss: Tensor = self.generalized_jsd_loss(student, teacher, beta=self.beta, reduction="sum")
        return loss

    def _own_completions(self, prompts: list[list[int]]) -> dict[str, Tensor]:
        sampling = Sampling(max_new_tokens=self._longest, temperature=self.temperature)
        said = completed(self._generator, prompts, sampling).ids
        rows = [
            {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
            for prompt, ids in zip(prompts, said, strict=True)
        ]
        inputs = DistillationCollator(self.processing_class.pad_token_id)(rows)
        return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}


def _states(model: Any, base: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states of all tokens that something follows `[rows * (length - 1), width]`."""
    with hidden_states(base.base_model) as seen:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return seen[-1][:, :-1].flatten(0, 1)


def _logits(base: Any, states: Tensor) -> Tensor:
    """float32 `[n, vocabulary]`."""
    form = logit_form(base.config)
    logits: Tensor = base.get_output_embeddings()(states).float() * form["scale"]
    return torch.tanh(logits / form["softcap"]) * form["softcap"] if form["softcap"] else logits


def _prompt_length(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
