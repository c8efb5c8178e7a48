"""TRL's ORPO and CPO, which compute all logits, on the fused head; and a token loss that counts a step's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl.data_utils import is_conversational
from trl.trainer.utils import add_fused_lm_head

from ftcore_trainers._fused_head import base_of, take_over
from ftcore_trainers._preference_trainer import PreferenceTrainer
from ftcore_trainers._rows_kept import say_dropped

IGNORED = -100
Batch = dict[str, Any]


class ConcatenatedTrainer(PreferenceTrainer):
    """A base to put before TRL's ORPOTrainer or CPOTrainer: the losses are theirs.

    The likelihood of the chosen answers is a mean over the tokens of the optimizer step; TRL's is a mean of the means
    of its micro-batches, which is the same where a step is one micro-batch.
    """

    nll_of_prompt = False
    """Whether the likelihood is that of the prompt as well."""
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    aux_loss_enabled: bool
    _tokens_of_step: int | None = None
    _micro_batches = 1

    def __init__(self, **kwargs: Any) -> None:
        tokenizer = kwargs["processing_class"]
        began = is_conversational(next(iter(kwargs["train_dataset"]))) or not _begins(tokenizer)
        self._of_rows = _Unbegun(tokenizer) if began else tokenizer
        super().__init__(**kwargs)
        if self.args.n_gpu > 1:  # its replicas would all call the forward of the first one
            raise ValueError("one process sees several GPUs: start it with `accelerate launch`, or show it one of them")
        self._choose_mask()
        # TRL gives these trainers no fused head; its own serves where the kernels' does not fit.
        add_fused_lm_head(base_of(self.model), outputs=("log_probs", "mean_logits"))
        take_over(self, mean_logits=True)
        self.train_dataset = self._with_answers("train", self.train_dataset)
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_answers("eval", self.eval_dataset)

    def tokenize_row(self, feature: dict[str, str], model: Any = None) -> dict[str, list[int]]:
        """TRL's, which puts a begin token before every row; a chat template, and the tokenizer, may have none."""
        tokenizer, self.processing_class = self.processing_class, self._of_rows
        try:
            made: dict[str, list[int]] = super().tokenize_row(feature, model)  # type: ignore[misc]
        finally:
            self.processing_class = tokenizer
        return made

    def _with_answers(self, name: str, rows: Any) -> Any:
        """TRL keeps rows whose prompt fills them, and divides by the number of their answer's tokens."""
        kept = rows.filter(_has_answers)
        say_dropped(name, rows, kept, self.args.max_length)
        return kept

    def average(self) -> bool:
        """Whether the log-probability of an answer is the mean over its tokens, not their sum."""
        return True

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, whose tokens are counted first."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._tokens_of_step = sum(int((self._nll_labels(batch)[:, 1:] != IGNORED).sum()) for batch in batches)
        self._micro_batches = len(batches)
        return batches, number

    def _nll_labels(self, batch: Batch) -> torch.Tensor:
        """Labels of the chosen rows `[B, S]` whose likelihood is trained."""
        if not self.nll_of_prompt:
            labels: torch.Tensor = batch["chosen_labels"]
            return labels
        ids: torch.Tensor = batch["chosen_input_ids"]
        return ids.masked_fill(batch["chosen_attention_mask"] == 0, IGNORED)

    def concatenated_forward(self, model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the chosen and of the rejected answers `[B]`, means of their logits, and the NLL."""
        device, pad = self.accelerator.device, self.processing_class.pad_token_id
        both = self.concatenated_inputs(batch, padding_value=pad, device=device)  # type: ignore[attr-defined]
        ids, answers = both["concatenated_input_ids"], both["concatenated_labels"]
        pairs = len(batch["chosen_labels"])
        asked = answers.clone()
        chosen = self._nll_labels(batch)
        asked[:pairs, : chosen.shape[1]] = chosen
        more = {"output_router_logits": True} if self.aux_loss_enabled else {}
        out = self._callable(model)(
            input_ids=ids,
            attention_mask=both["concatenated_attention_mask"],
            labels=asked,
            use_cache=False,
            fused_lm_head=True,
            **more,
        )
        answered = answers[:, 1:] != IGNORED
        logps = (out.log_probs * answered).sum(1)
        if self.average():
            logps = logps / answered.sum(1)
        means = out.mean_logits
        return (
            logps[:pairs],
            logps[pairs:],
            means[:pairs][answered[:pairs]],
            means[pairs:][answered[pairs:]],
            self._nll(model, out.log_probs[:pairs], asked[:pairs]),
            *([out.aux_loss] if self.aux_loss_enabled else []),
        )

    def _nll(self, model: Any, logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not self.model.training or self._tokens_of_step is None:
            return -logps.sum() / (labels[:, 1:] != IGNORED).sum()
        # The trainer divides by the number of micro-batches, and weights a part of one by its share of the rows.
        return -logps.sum() * (self._micro_batches / self._tokens_of_step / self._share)


class _Unbegun:
    """A tokenizer that has no begin token."""

    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, **options)


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its begin token before a text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]


def _has_answers(row: dict[str, Any]) -> bool:
    return all(any(label != IGNORED for label in row[f"{side}_labels"][1:]) for side in ("chosen", "rejected"))
