"""TRL's SFTTrainer with the loss of the model's own fused head: one pass, and no wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftcore import Plan
from ftcore.memory import layers_that_choose
from ftcore_trainers._arguments import early_stopping, quiet, shared
from ftcore_trainers._buckets import Buckets, contexts
from ftcore_trainers._collator import COUNTS, WithoutMask, causal
from ftcore_trainers._dtypes import kept_dtypes
from ftcore_trainers._fused_head import take_over
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._measures import perplexity
from ftcore_trainers._token_sums import TokenSums


class FusedSFTTrainer(LeanLoop, SFTTrainer):
    """Where a kernel has the head: its loss and its metrics; everything else, and every other loss, is TRL's.

    Entropy and accuracy are means over the tokens since the last line of the log; TRL's are means of the means of the
    micro-batches, which is the same for one micro-batch a line.
    """

    data_collator: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        plain = self.args.loss_type == "nll" and self.label_smoother is None and self.compute_loss_func is None
        self._loss_only = take_over(self) and plain
        self._likelihood = plain
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        ours = type(self.data_collator) is DataCollatorForLanguageModeling
        if self._loss_only and ours and causal(self.model.config):
            recorded = min((layer.recorded for layer in layers_that_choose(self.model)), default=0)
            self.data_collator = WithoutMask(
                self.data_collator,
                Buckets(recorded, self.data_collator.pad_token_id, contexts(self.model.config)) if recorded else None,
                find_supervised=self.args.n_gpu <= 1,  # DataParallel cuts every tensor of a batch into shares
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The next-token loss over the supervised tokens of the optimizer step, or of the batch."""
        if not self._loss_only:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name != "num_tokens"} | {"use_cache": False}
        if num_items_in_batch is not None:
            given["num_items_in_batch"] = torch.as_tensor(num_items_in_batch).clamp(min=1)
        output = model(**given, fused_loss=True)
        loss, processes = output.loss, self.accelerator.num_processes // self.get_tp_size()
        # As in TRL: the tokens of every process were counted, and DDP takes the mean of the gradients.
        if processes > 1 and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * processes
        self._sums[self._mode()].add(output, tokens_in(inputs))
        if not return_outputs:
            return loss
        with torch.no_grad():  # who wants the logits pays for them
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", *COUNTS)}
            return loss, model(**inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Read the sums, for TRL's own `log` to take with its metrics."""
        mode = self._mode()
        sums = self._sums[mode].over_processes(self.accelerator)
        self._sums[mode] = TokenSums()
        if sums.batches:
            tokens = max(sums.supervised, 1)
            self._total_train_tokens += sums.read // self.get_tp_size() if mode == "train" else 0
            self._metrics[mode]["entropy"] = [sums.entropy / tokens]
            self._metrics[mode]["mean_token_accuracy"] = [sums.top1 / tokens]
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if self._likelihood and "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"] - self._of_router(mode))
        super().log(logs, start_time)

    def forget_evaluation(self) -> None:
        """The sums as well."""
        super().forget_evaluation()
        self._sums["eval"] = TokenSums()

    def _of_router(self, mode: str) -> float:
        """The part of the loss that is no likelihood: that of a mixture of experts for balance between them."""
        values = self._metrics[mode].get("aux_loss")
        return float(self.router_aux_loss_coef * sum(values) / len(values)) if values else 0.0

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


def make(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    dataset: Any,
    collator: Any,
    callbacks: Any,
    optimizer: Any,
    options: Mapping[str, Any],
) -> FusedSFTTrainer:
    """The trainer of a plan whose rows are tokenized already.

    :param options: Further arguments of TRL's SFTConfig.
    """
    trainer = plan.run.trainer
    assert trainer is not None
    arguments = {
        "max_length": trainer.max_length,
        "packing": trainer.packing,
        "eval_packing": False,
        **shared(plan, "eval" in dataset),
        **options,
    }
    with kept_dtypes(model):
        made: FusedSFTTrainer = quiet(
            FusedSFTTrainer(
                model=model,
                args=SFTConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                data_collator=collator,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
    return made


def tokens_in(inputs: dict[str, Any]) -> torch.Tensor | int:
    """Tokens of a batch that are no padding: the collator's count, the mask's, or all where the rows are packed."""
    if "num_tokens" in inputs:
        return int(inputs["num_tokens"])
    if "attention_mask" in inputs:
        total: torch.Tensor = inputs["attention_mask"].sum()
        return total
    return int(inputs["input_ids"].numel())
