"""What trainers share that learn from completions of their own: the generator's place in TRL's, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftcore import Sampling
from ftcore.specs import Batching
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._written_ahead import TIMES, Ahead

if TYPE_CHECKING:
    from torch import Tensor

    from ftcore import Completions
    from ftcore.specs import Generator
    from ftcore_trainers._reference import Reference


class WritesAhead:
    """A base to put before a trainer of transformers' kind that has held-out prompts completed."""

    args: Any
    _generator: Generator
    _ahead: Ahead | None = None

    def ids_of(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the rows' prompts, as the trainer will ask for their completions."""
        raise NotImplementedError

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; a generator that says how many it completes at once is given many batches in a call."""
        # Under accelerate's loader, which finds out which batch is the last: metrics are gathered by that.
        plain = dataloader.base_dataloader
        if isinstance(self._generator, Batching):
            batches = max(1, TIMES * self._generator.at_once // self.args.eval_batch_size)
            self._ahead = dataloader.base_dataloader = Ahead(plain, batches, self.ids_of)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
        finally:
            dataloader.base_dataloader, self._ahead = plain, None

    def written(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """One completion per prompt: what was written ahead, or else written now."""

        def write(prompts: Sequence[Sequence[int]]) -> Completions:
            return completed(self._generator, prompts, sampling)

        taken = None if self._ahead is None else self._ahead.taken(prompt_ids, write)
        return write(prompt_ids) if taken is None else taken


class Rollouts(WritesAhead, LeanLoop):
    """A base to put before GRPOTrainer or RLOOTrainer: completions from a Generator, and the given reference model."""

    model: Any
    beta: float
    max_completion_length: int
    prepares = True
    repeatable = False
    _step: int
    _buffered_inputs: list[Any] | None
    _sampler: Any = None
    num_iterations: int
    kept = (*LeanLoop.kept, "_step", "_buffered_inputs")

    def __init__(self, generator: Generator, reference: Reference | None, **kwargs: Any) -> None:
        args = kwargs["args"]
        beta, args.beta = args.beta, 0.0  # TRL's constructor would make a reference model of its own
        super().__init__(**kwargs)
        args.beta = self.beta = beta
        self.ref_model = reference
        self._generator = generator
        self.add_callback(weights_changed(generator))  # type: ignore[attr-defined]

    def kept_now(self) -> tuple[str, ...]:
        """With the rollout, where the next step learns from it once more."""
        whole = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        # Several processes have a rollout each, and one checkpoint: they make theirs anew, as TRL does.
        return self.kept[:-1] if whole or self.args.world_size > 1 else self.kept

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the trainer's own; the run may go on with other micro-batches, which are what `_step` counts."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            if self._buffered_inputs is not None and len(self._buffered_inputs) != self.args.steps_per_generation:
                self._buffered_inputs = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return self._sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the trainer's own; TRL's sampler draws the order of a pass as it begins, those of past ones as well."""
        import torch

        passes, batches = super()._init_training_state(*args, **kwargs)
        generator = getattr(self._sampler, "generator", None)
        for _ in range(passes if generator is not None else 0):
            torch.randperm(self._sampler.num_samples, generator=generator)
        return passes, batches

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, which counts micro-batches here, not the passes that one takes."""
        loss = super().training_step(*args, **kwargs)
        self._step += 1
        return loss

    def _one_pass(self, *args: Any) -> Any:
        step = self._step
        try:
            return super()._one_pass(*args)
        finally:
            self._step = step

    def complete(self, prompt_ids: Sequence[Sequence[int]], images: Any) -> Completions:
        """One completion per prompt; TRL repeats each prompt once per completion of its group already."""
        if images:
            raise NotImplementedError("the generator completes text prompts only")
        return self.written(prompt_ids, sampling_of(self.args, self.max_completion_length))

    def ids_of(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the rows' prompts, as TRL makes them."""
        ids: list[list[int]] = self._tokenize_prompts([row["prompt"] for row in rows])[0]  # type: ignore[attr-defined]
        return ids


def sampling_of(args: Any, max_new_tokens: int) -> Sampling:
    """How TRL's arguments say that tokens are drawn."""
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=max(args.top_k or 0, 0),  # some libraries write -1 for any number
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
    )


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a conversation, up to where the answer begins."""
    from ftcore.chat import render

    ids: list[int] = tokenizer(render(tokenizer, prompt, generate=True), add_special_tokens=False)["input_ids"]
    return ids


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask `[rows, length]` int64."""
    import torch

    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[*[pad] * gap * left, *row, *[pad] * gap * (not left)] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[*[0] * gap * left, *[1] * len(row), *[0] * gap * (not left)] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def completed(generator: Generator, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
    """Completions of a step, between the generator's two calls about memory."""
    generator.begin_rollout()
    try:
        return generator.generate(prompt_ids, sampling)
    finally:
        generator.end_rollout()


@contextmanager
def hidden_states(backbone: Any) -> Iterator[list[Tensor]]:
    """The last hidden states of every pass through the backbone inside the block."""
    seen: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


def weights_changed(generator: Generator) -> Any:
    """The callback that tells the generator of every optimizer step."""
    from transformers import TrainerCallback

    class WeightsChanged(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            generator.weights_changed()

    return WeightsChanged()
