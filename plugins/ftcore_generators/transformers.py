"""Completions by transformers' own `generate`, with the very weights that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ftcore import Completions, GeneratorConfig, Sampling, hookimpl
from ftcore.device import give_memory_back

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass
class Config(GeneratorConfig):
    """The transformers generator's settings."""

    batch: int = 64
    """Prompts completed at once."""


@hookimpl
def ftcore_make_generator(plan: Any, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> TransformersGenerator:
    """A generator over the model that is trained: no copy."""
    return TransformersGenerator(model, tokenizer, plan.config(Config).batch)


class TransformersGenerator:
    """Left-padded batches through `model.generate`."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch: int) -> None:
        self._model, self._tokenizer, self._batch = model, tokenizer, batch

    @property
    def at_once(self) -> int:
        """Prompts of one padded batch."""
        return self._batch

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        media: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Completions:
        """One completion per prompt; each ends with the end token unless it was cut off.

        :param media: For each prompt what the model takes besides its tokens, such as `pixel_values`; prompts are
            completed one by one then.
        """
        from ftcore.answers import end_ids, evaluating
        from ftcore.guards.shortage import is_out_of_memory

        ends = set(end_ids(self._model, self._tokenizer))
        ids: list[list[int]] = []
        with evaluating(self._model):
            while len(ids) < len(prompt_ids):
                start, at_once = len(ids), self._batch if media is None else 1
                shown = {} if media is None else media[start] or {}
                prompts = prompt_ids[start : start + at_once]
                if sampling.repetition_penalty != 1:  # it would count pads, which may be the end token
                    prompts = list(takewhile(lambda prompt, first=prompts[0]: len(prompt) == len(first), prompts))
                try:
                    rows = self._complete(prompts, sampling, sorted(ends), shown)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    said = str(error).splitlines()[0]
                else:
                    ids += [_until_end(row, ends) for row in rows]
                    continue
                # Past the `except`, whose traceback held the cache.
                self._batch = fewer(len(prompts), said)
                print(
                    f"generator: out of memory with {len(prompts)} completions at a time; going on with {self._batch}"
                )
        return Completions(ids=ids)

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, show: Callable[[list[int]], None]) -> list[int]:
        """Complete one prompt, and show every token."""
        from ftcore.answers import end_ids, evaluating
        from ftcore.guards.shortage import is_out_of_memory

        ends = set(end_ids(self._model, self._tokenizer))
        with evaluating(self._model):
            try:
                [row] = self._complete([prompt_ids], sampling, sorted(ends), {"streamer": _Shown(show)})
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
            else:
                return _until_end(row, ends)
        raise _too_little(said)

    def begin_rollout(self) -> None:
        """Nothing to take."""

    def end_rollout(self) -> None:
        """Nothing to give back."""

    def weights_changed(self) -> None:
        """The weights are the trained ones themselves."""

    def _complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: list[int], more: Mapping[str, Any]
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        if not all(map(len, prompts)):
            raise ValueError("a prompt has no tokens: give one at least, such as the one that begins a text")
        pad: Any = self._tokenizer.pad_token_id
        width = max(map(len, prompts))
        tokens = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            use_cache=True,
            **_drawing(sampling),
        )
        more = {name: x.to(tokens.device) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        with torch.no_grad():
            out = self._model.generate(input_ids=tokens, attention_mask=mask, generation_config=settings, **more)
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


def fewer(rows: int, error: str) -> int:
    """How many completions to write at a time where so many did not fit. Raises NoMemory where one did not."""
    if rows < 2:
        raise _too_little(error)
    give_memory_back()
    return rows // 2


def _too_little(error: str) -> Exception:
    from ftcore.guards.memory import NoMemory

    give_memory_back()
    return NoMemory(
        f"out of memory while one completion was written: {error}\n"
        "    fix: give shorter prompts or completions, add +quantizer=bnb_nf4, or free some of the GPU"
    )


class _Shown:
    """What transformers calls a streamer: it is put the prompt first, and then each new token, int64 `[1]`."""

    def __init__(self, show: Callable[[list[int]], None]) -> None:
        self._show, self._prompted = show, False

    def put(self, ids: Any) -> None:
        if self._prompted:
            self._show(ids.tolist())
        self._prompted = True

    def end(self) -> None:
        """Everything is shown."""


def _drawing(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,  # also 0: what is not said is the checkpoint's
    }
    return options | {"repetition_penalty": sampling.repetition_penalty}


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row
