"""Who reads an export: what a consumer can be asked, and transformers as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Consumer(Protocol):
    """A program that has loaded an artifact. What goes wrong in it is raised as Refused."""

    name: str
    eog: list[int]
    """Ids of the tokens that end an answer."""
    longest: int
    """Tokens of one text up to which it computes what the model does; a context that was cut to a window is short."""

    def tokens(self, text: str) -> list[int]:
        """Token ids of a prompt, as the consumer itself reads one."""
        ...

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each token: `[len(ids), vocab]`, float32, on the CPU."""
        ...

    def greedy(self, ids: Sequence[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        """At most `count` new tokens, the most likely each, up to one of `eog` or `stop`, which is left out."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Transformers:
    """A transformers model and its tokenizer. The model is left in the mode and the dtype that it had.

    :param rendered: texts are rendered conversations, in which the template has put all special tokens.
    """

    name = "transformers"
    longest = 2**31

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, rendered: bool) -> None:
        from ftcore.answers import end_ids

        self.model, self.tokenizer, self.rendered = model, tokenizer, rendered
        self.writes = bool(getattr(model, "can_generate", lambda: False)())
        self.eog = end_ids(model, tokenizer) if self.writes else []

    def tokens(self, text: str) -> list[int]:
        """As training and `ftcore chat` tokenize."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.rendered)["input_ids"]
        return ids

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each token, or of the whole text where the model classifies; a plain encoder's hidden states."""
        import torch

        from ftcore.answers import evaluating

        with evaluating(self.model), torch.no_grad():
            out = self.model(input_ids=self._batch(ids), attention_mask=torch.ones_like(self._batch(ids)))
        values: torch.Tensor = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
        return values.reshape(-1, values.shape[-1]).float().cpu()

    def greedy(self, ids: Sequence[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        """By `generate`, without the penalties that the model's own generation config may ask for."""
        import torch
        from transformers import GenerationConfig

        from ftcore.answers import evaluating

        ends = sorted({*self.eog, *stop})
        settings = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )
        given = self._batch(ids)
        with evaluating(self.model), torch.no_grad():
            out = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings
            )
        new: list[int] = out[0, given.shape[1] :].tolist()
        return new[:-1] if new and new[-1] in ends else new

    def close(self) -> None:
        """Let the model go."""
        self.model = None

    def _batch(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        return torch.tensor([list(ids)], device=self.model.device)
