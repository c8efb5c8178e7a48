"""PPO on transformers' Trainer: a rollout, then some epochs of clipped updates on it, and again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from trl.trainer.utils import add_fused_lm_head

from ftcore import Problem, Refused, Sampling
from ftcore.answers import end_ids, evaluating
from ftcore_trainers import _ppo_math as ppo
from ftcore_trainers._fused_head import base_of, take_over
from ftcore_trainers._lean_loop import LeanLoop, optimized
from ftcore_trainers._rollouts import WritesAhead, hidden_states, padded, prompt_ids, weights_changed

if TYPE_CHECKING:
    from ftcore.specs import Generator, Reward
    from ftcore_trainers._reference import Reference
    from ftcore_trainers.ppo import Config

Rows = list[dict[str, Any]]
Batch = dict[str, Tensor]

VALUE_HEAD = "value_head.safetensors"
"""File beside the adapter's, in checkpoints and in what was trained: the value head and the KL coefficient."""


class PPOTrainer(WritesAhead, LeanLoop, Trainer):
    """Policy, reference and value share one set of base weights.

    The policy is the model with its adapter, the reference the model without it, and the value a linear layer on the
    policy's last hidden states, read in the same pass as its log-probabilities.
    """

    kept = (*LeanLoop.kept, "_rollout", "_order")

    prepares = True
    repeatable = False

    def __init__(
        self,
        settings: Config,
        generator: Generator,
        reference: Reference | None,
        rewards: Sequence[Reward],
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=list, **kwargs)
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1:
            raise Refused(
                Problem("trainer", "ppo trains on one device", "start it without a launcher, and show it one GPU")
            )
        # Losses are means over the tokens of an optimizer step already; see `compute_loss`.
        self.model_accepts_loss_kwargs = False
        self._settings, self._generator, self._reference, self._rewards = settings, generator, reference, rewards
        self._kl = ppo.KLCoefficient(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self._metrics: dict[str, dict[str, list[tuple[float, float]]]] = {"train": _lists(), "eval": _lists()}
        self._rollout: Batch | None = None
        self._order = torch.empty(0, dtype=torch.long)
        self._batches = -1
        base = base_of(self.model)
        if not take_over(self, temperature=settings.temperature):
            add_fused_lm_head(base, temperature=settings.temperature, outputs=("log_probs", "entropy"))
        self.value_head = nn.Linear(base.config.get_text_config().hidden_size, 1, device=self.args.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.add_callback(weights_changed(generator))

    # ------------------------------------------------------------------------------------------------ the rollout

    @torch.no_grad()
    def roll_out(self, rows: Rows) -> Batch:
        """Complete the prompts, score the completions, and find advantages and returns: all that updates need."""
        prompts = self.ids_of(rows)
        s = self._settings
        sampling = Sampling(max_new_tokens=s.max_completion_length, temperature=s.temperature, top_p=s.top_p)
        completions = self.written(prompts, sampling).ids
        batch = self._padded(prompts, completions)
        scores = self._scores(rows, completions)
        mask = batch["mask"]

        micro = self.args.per_device_train_batch_size
        with evaluating(self.model):
            parts = [self._look_at(self.model, part) for part in _parts(batch, micro)]
            logprobs, values, _ = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            reference = logprobs
            if self._reference is not None:
                reference = torch.cat([self._logprobs(self._reference, part)[0] for part in _parts(batch, micro)])

        rewards = ppo.token_rewards(scores, logprobs, reference, mask, self._kl.value)
        if s.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, shift=False)
        advantages = ppo.advantages_of(rewards, values, mask, s.gamma, s.lam)
        returns = (advantages + values) * mask
        if s.whiten_advantages:
            advantages = ppo.whiten(advantages, mask)

        kl = ((logprobs - reference) * mask).sum(1).mean().item()
        self._record(len(rows), kl=kl, kl_coef=self._kl.value)
        self._record(
            float(mask.sum()),
            values=(values * mask).sum() / mask.sum(),
            returns=returns.sum() / mask.sum(),
            explained_variance=ppo.explained_variance(values, returns, mask),
        )
        if self.model.training:
            self._kl.follow(kl, len(rows))
        return batch | {
            "old_logprobs": logprobs,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
        }

    def ids_of(self, rows: Rows) -> list[list[int]]:
        """Token ids of the rows' prompts."""
        return [prompt_ids(self.processing_class, row["prompt"]) for row in rows]

    def _scores(self, rows: Rows, completions: list[list[int]]) -> Tensor:
        """The sum of the rewards of each completion `[rows]`; one that no reward applies to has 0."""
        texts = self.processing_class.batch_decode(completions, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        total = torch.zeros(len(rows), device=self.args.device)
        for reward in self._rewards:
            said = reward(
                prompts=[row["prompt"] for row in rows],
                completions=[[{"role": "assistant", "content": text}] for text in texts],
                completion_ids=completions,
                trainer_state=self.state,
                log_metric=lambda name, value: self._record(**{name: value}),
                log_extra=lambda column, values: None,
                **columns,
            )
            values = torch.tensor([math.nan if v is None else float(v) for v in said], device=total.device)
            total += values.nan_to_num()
            known = len(said) - int(values.isnan().sum())
            self._record(known, **{f"rewards/{reward.__name__}/mean": values.nanmean()})
        ended = set(end_ids(self.model, self.processing_class))
        cut = torch.tensor([ids[-1] not in ended for ids in completions], device=total.device)
        lengths = [len(ids) for ids in completions]
        self._record(
            len(completions),
            reward=total.mean(),
            reward_std=total.std(correction=0),
            **{"completions/mean_length": sum(lengths) / len(lengths), "completions/clipped_ratio": cut.float().mean()},
        )
        return total - self._settings.missing_eos_penalty * cut

    def _padded(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch:
        """Rows `[rows, length]` padded on the right; `start` is the place of the state before the first action."""
        device, pad = self.args.device, self.processing_class.pad_token_id
        ids, mask = padded([p + c for p, c in zip(prompts, completions, strict=True)], pad, device)
        start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        trained = (mask == 1) & (torch.arange(ids.shape[1], device=device) > start[:, None])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(~trained, -100),
            "start": start,
            "mask": padded(completions, pad, device)[1].float(),
        }

    # ------------------------------------------------------------------------------------------------- the updates

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's part of the mean over all tokens of the optimizer step: any split gives the same."""
        if return_outputs:
            raise NotImplementedError("a rollout has no outputs besides its loss")
        s, mask = self._settings, inputs["mask"]
        logprobs, values, entropy = self._look_at(model, inputs)
        policy = ppo.policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], mask, s.cliprange)
        value = ppo.value_loss(values, inputs["old_values"], inputs["returns"], mask, s.cliprange_value)
        with torch.no_grad():
            tokens = mask.sum()
            log_ratio = (logprobs - inputs["old_logprobs"]) * mask
            self._record(
                float(tokens),
                policy_loss=policy.loss / tokens,
                value_loss=value.loss / tokens,
                clip_ratio=policy.clipped / tokens,
                value_clip_ratio=value.clipped / tokens,
                approx_kl=(log_ratio.exp() - 1 - log_ratio).sum() / tokens,
                entropy=(entropy * mask).sum() / tokens,
            )
        loss = (policy.loss + s.vf_coef * value.loss) / inputs["tokens"]
        # The loop divides by the number of micro-batches, which the division by tokens did.
        return loss * (self.current_gradient_accumulation_steps if self.model.training else 1)

    def weight(self, share: float) -> float:
        """A sum by the tokens of the step needs none."""
        return 1.0

    def _look_at(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies of the actions `[rows, tokens]`, from one pass."""
        with hidden_states(base_of(self.model).base_model) as seen:
            logprobs, entropy = self._logprobs(model, batch)
        states = seen[-1]
        place = _places(batch)[..., None].expand(-1, -1, states.shape[-1])
        with torch.autocast(states.device.type, enabled=False):
            values = self.value_head(states.gather(1, place).float()).squeeze(-1)
        return logprobs, values * batch["mask"], entropy

    def _logprobs(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the actions under a model; the logits of all tokens never exist."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        with self.accelerator.autocast():
            output = model(**given, fused_lm_head=True)
        place, mask = _places(batch), batch["mask"]
        entropy = output.log_probs.detach() * 0 if output.entropy is None else output.entropy
        return (output.log_probs.float().gather(1, place) * mask, entropy.float().gather(1, place) * mask)

    # ----------------------------------------------------------------------------------- batches, for the Trainer

    @property
    def _uses(self) -> int:
        """Micro-batches that one rollout is good for."""
        s = self._settings
        accumulation: int = self.args.gradient_accumulation_steps
        return s.num_ppo_epochs * s.num_mini_batches * accumulation

    def get_train_dataloader(self) -> Any:
        """Prompts of a rollout at a time, each as often as the loop takes a micro-batch of it."""
        rows = self._settings.global_batch * self._settings.num_mini_batches
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=rows,
            sampler_fn=lambda dataset: PromptSampler(
                len(dataset), rows, self._uses, self.args.seed, lambda: int(self.state.epoch or 0)
            ),
            is_training=True,
        )

    def kept_now(self) -> tuple[str, ...]:
        """With the rollout, where the next step learns from it once more."""
        return self.kept if self._batches % self._uses else self.kept[:-2]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, and counted."""
        if self._batches < 0:  # a run that goes on may begin within a rollout
            self._batches = self.state.global_step * self.args.gradient_accumulation_steps
        loss: Tensor = super().training_step(*args, **kwargs)
        self._batches += 1
        return loss

    def _prepare_inputs(self, inputs: Rows) -> Batch:
        """The prompts' rollout where there is none yet, and the micro-batch of it whose turn it is."""
        if self._given is not None:
            given: Batch = self._given
            return given
        if not self.model.training:
            rollout = self.roll_out(inputs)
            return rollout | {"tokens": rollout["mask"].sum()}
        use, rows = self._batches % self._uses, self.args.per_device_train_batch_size
        if use == 0 or self._rollout is None:
            self._rollout = self.roll_out(inputs)
        per_epoch = self._uses // self._settings.num_ppo_epochs
        if use % per_epoch == 0 or len(self._order) != len(inputs):
            self._order = torch.randperm(len(inputs))
        place = use % per_epoch
        step = self._settings.global_batch
        in_step = self._order[place * rows // step * step :][:step]
        chosen = self._order[place * rows :][:rows].to(self.args.device)
        tokens = self._rollout["mask"][in_step.to(self.args.device)].sum()
        return {name: tensor[chosen] for name, tensor in self._rollout.items()} | {"tokens": tokens}

    def prediction_step(self, model: Any, inputs: Rows, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of a rollout on held-out prompts, which nothing is learnt from; its reward is `eval_reward`."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # ----------------------------------------------------------------------------- the value head, and the metrics

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The model's optimizer with a group for the value head."""
        optimizer = super().create_optimizer(*args, **kwargs)
        head = list(self.value_head.parameters())
        if not any(parameter is head[0] for parameter in optimized(optimizer)):
            optimizer.add_param_group({"params": head, "lr": self._settings.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.save_beside(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(Path(resume_from_checkpoint))

    def save_beside(self, folder: Path) -> None:
        """The value head and the KL coefficient."""
        state = {**self.value_head.state_dict(), "kl_coef": torch.tensor(self._kl.value, dtype=torch.float64)}
        save_file(state, folder / VALUE_HEAD)

    def load_beside(self, folder: Path) -> None:
        """Those that `save_beside` wrote; runs of before wrote none beside what they trained."""
        if (folder / VALUE_HEAD).is_file():
            self._load_head(folder)

    def _load_head(self, folder: Path) -> None:
        state = load_file(folder / VALUE_HEAD)
        self._kl.value = float(state.pop("kl_coef"))
        self.value_head.load_state_dict(state)

    def _record(self, weight: float = 1.0, /, **values: Any) -> None:
        for name, value in values.items():
            if not math.isnan(number := float(value)):
                self._metrics["train" if self.model.training else "eval"][name].append((number, weight))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the means of what was recorded since the last line."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        for name, pairs in self._metrics[mode].items():
            logs[prefix + name] = sum(v * w for v, w in pairs) / max(sum(w for _, w in pairs), 1e-9)
        self._metrics[mode].clear()
        super().log(logs, *args, **kwargs)


class PromptSampler(torch.utils.data.Sampler[int]):
    """All rows in a new order each epoch, cut into rollouts; the last is filled up from the front of the order."""

    def __init__(self, rows: int, rollout: int, uses: int, seed: int, epoch: Callable[[], int]) -> None:
        self._rows, self._rollout, self._uses, self._seed, self._epoch = rows, rollout, uses, seed, epoch

    def __len__(self) -> int:
        return -(-self._rows // self._rollout) * self._rollout * self._uses

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(self._seed + self._epoch())
        order = torch.randperm(self._rows, generator=drawn).tolist()
        for start in range(0, self._rows, self._rollout):
            chosen = [order[place % self._rows] for place in range(start, start + self._rollout)]
            for _ in range(self._uses):
                yield from chosen


def _places(batch: Batch) -> Tensor:
    """Where in the shifted row the actions are `[rows, tokens]`; those of the padding point at its end."""
    width, last = batch["mask"].shape[1], batch["input_ids"].shape[1] - 2
    steps = torch.arange(width, device=batch["start"].device)
    return (batch["start"][:, None] + steps).clamp(max=last)


def _parts(batch: Batch, rows: int) -> Iterator[Batch]:
    for start in range(0, len(batch["input_ids"]), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def _lists() -> dict[str, list[tuple[float, float]]]:
    return defaultdict(list)
