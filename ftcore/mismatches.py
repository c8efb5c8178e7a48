"""What does not fit between a tokenizer, its chat template, the model and an adapter: found before any weight is read.

Each check takes a :class:`Fit` and yields what it found. What would break a run, or train something else than it says,
ends it; the rest is said once as a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import checkpoint
from ftcore.adapter_folder import saved_template, saved_tokens
from ftcore.errors import Exit, Problem, Refused, refuse
from ftcore.report import note
from ftcore.specs import Plan, Shape
from ftcore.template_facts import Probe, ends_of, marks_astray, split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TALKS = frozenset({Shape.MESSAGES, Shape.IMAGES, Shape.PREFERENCE, Shape.UNPAIRED, Shape.PROMPTS})
"""Shapes whose rows go through the chat template."""
TEMPLATE, MODEL, ADAPTER = "data.template", "model", "adapter.path"


@dataclass(frozen=True)
class Fit:
    """A plan and its tokenizer, with what the checks ask of them."""

    plan: Plan
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def rows(self) -> int | None:
        """Rows of the embedding; None where the checkpoint's config is not on this machine, or does not say."""
        assert self.plan.run.model is not None
        try:
            known = checkpoint.settings(self.plan.run.model, self.plan.family)
        except (Refused, KeyError):  # said by another check
            return None
        size = known.get("text_vocab_size") or known.get("vocab_size")
        return int(size) if isinstance(size, int) else None

    @cached_property
    def beyond(self) -> dict[str, int]:
        """Tokens whose ids have no row in the embedding.

        `model.new_tokens` get theirs when the model is loaded; Llama 3.2 Vision's token of images has one beyond those
        of its vocabulary, as its config says.
        """
        assert self.plan.run.model is not None
        if self.rows is None:
            return {}
        vision, known = self.plan.family.vision, checkpoint.settings(self.plan.run.model, self.plan.family)
        made = set(self.plan.run.model.new_tokens)
        vocabulary = self.tokenizer.get_vocab()
        if vision and vocabulary.get(vision.image) == known.get("image_token_index") == self.rows:
            made.add(vision.image)
        return {word: number for word, number in vocabulary.items() if number >= self.rows and word not in made}

    @cached_property
    def adapter(self) -> Path | None:
        """Folder of the adapter that is trained on."""
        path = getattr(self.plan.run.adapter, "path", None)
        return Path(path) if path else None

    @cached_property
    def probe(self) -> Probe | None:
        """Two turns as the template writes them; None where it takes other conversations than these."""
        form = self.plan.format
        if form is None or form.shape not in TALKS or not self.tokenizer.chat_template:
            return None
        try:
            return Probe.of(self.tokenizer)
        except Refused:  # rows are asked one by one, and the first that it does not take is named
            return None


@dataclass(frozen=True)
class Mismatch:
    """Something that does not fit, and whether a run ends by it."""

    problem: Problem
    fatal: bool


Found = Iterator[Mismatch]


def check_tokenizer(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of what does not fit. Raises Refused where a run would break, or train something else than it says."""
    found = mismatches(plan, tokenizer)
    refuse([one.problem for one in found if one.fatal])
    for one in found:
        fix = f"; {one.problem.fix}" if one.problem.fix else ""
        note(f"warning: {one.problem.key}: {one.problem.message}{fix}")


def mismatches(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[Mismatch]:
    """Everything that does not fit. Of a tiny random model only what would break: its tokenizer is no real one."""
    fit = Fit(plan, tokenizer)
    found = [one for check in CHECKS for one in check(fit)]
    assert plan.run.model is not None
    stand_in = checkpoint.find(plan.run.model, plan.family).kind == "random"
    return [one for one in found if one.fatal or not stand_in]


def _embedding(fit: Fit) -> Found:
    """The vocabulary is no larger than the embedding."""
    if not fit.beyond:
        return
    words = sorted(fit.beyond, key=lambda word: fit.beyond[word])
    # Not all that are special: Gemma 3 1B's tokenizer knows an image token, which no row of text is ever given.
    named = {fit.tokenizer.bos_token, fit.tokenizer.eos_token, fit.tokenizer.pad_token}
    used = [w for w in words if w in named or (fit.probe and w in fit.probe.text)]
    said = ", ".join(repr(word) for word in (used or words)[:3])
    message = f"the tokenizer has {len(words)} tokens that the embedding of {fit.rows} rows does not ({said})"
    fix = "take the tokenizer that belongs to the weights, or name the new tokens: 'model.new_tokens=[...]'"
    yield Mismatch(Problem(MODEL, message, fix, Exit.DATA), fatal=bool(used))


def _adapter_tokens(fit: Fit) -> Found:
    """The adapter knows no tokens that the tokenizer does not: its rows would be left out, or be another token's."""
    if fit.adapter is None:
        return
    known = fit.tokenizer.get_vocab()
    saved = saved_tokens(fit.adapter)
    new = [word for word in saved if word not in known]
    if new:
        said = ", ".join(new[:3])
        message = f"the adapter was trained with {len(new)} tokens that the tokenizer does not have: {said}"
        named = ",".join(f'"{word}"' for word in new)
        yield Mismatch(Problem(ADAPTER, message, f"add 'model.new_tokens=[{named}]'", Exit.DATA), fatal=True)
        return
    moved = next((word for word, number in saved.items() if known[word] != number), None)
    if moved is not None:
        message = f"{moved!r} is token {saved[moved]} of the adapter's tokenizer, and token {known[moved]} of this one"
        fix = "name the new tokens in the order in which the adapter was trained with them"
        yield Mismatch(Problem(ADAPTER, message, fix, Exit.DATA), fatal=True)


def _adapter_template(fit: Fit) -> Found:
    """An adapter goes on with the chat template that it was trained with."""
    saved = saved_template(fit.adapter) if fit.adapter is not None else None
    if saved is not None and saved != fit.tokenizer.chat_template:
        message = "the adapter was trained with another chat template than the one that is used now"
        yield Mismatch(Problem(TEMPLATE, message, "leave data.template out to go on with the adapter's"), fatal=False)


def _padding(fit: Fit) -> Found:
    """Rows are padded with a token that there is."""
    tokenizer: Any = fit.tokenizer
    pad = tokenizer.pad_token
    fix = "set pad_token in the checkpoint's tokenizer_config.json to a token of its vocabulary"
    if pad is None:
        yield Mismatch(Problem(MODEL, "the tokenizer has neither a padding token nor an end token", fix), fatal=True)
    elif str(pad) not in tokenizer.get_vocab():
        yield Mismatch(Problem(MODEL, f"the padding token {str(pad)!r} is not in the vocabulary", fix), fatal=True)
    elif tokenizer.unk_token is not None and tokenizer.pad_token_id == tokenizer.unk_token_id:
        message = f"the padding token is the unknown token {str(pad)!r}, so what the tokenizer does not know is padding"
        yield Mismatch(Problem(MODEL, message, fix), fatal=False)


def _split(fit: Fit) -> Found:
    """What the template writes as control tokens is read as such, not letter by letter."""
    for word, pieces in split_words(fit.tokenizer, fit.probe):
        message = f"the template writes {word!r}, which the tokenizer reads as {pieces} tokens"
        fix = f"use the checkpoint's own template, or add it: 'model.new_tokens=[\"{word}\"]'"
        yield Mismatch(Problem(TEMPLATE, message, fix), fatal=False)


def _ends(fit: Fit) -> Found:
    """Answers are trained to end with a token at which generation stops."""
    if fit.probe is None:
        return
    stops = ends_of(fit.plan, fit.tokenizer)
    names = ", ".join(repr(word) for word in stops) or "nothing"
    if fit.probe.end not in stops:
        message = f"an answer ends with {fit.probe.end!r}, but generation stops at {names}"
        fix = "use a template that ends turns with that token, or the checkpoint's own tokenizer"
        yield Mismatch(Problem(TEMPLATE, message, fix), fatal=False)


def _begin(fit: Fit) -> Found:
    """A conversation begins once."""
    begin = fit.tokenizer.bos_token_id
    if fit.probe is not None and begin is not None and fit.probe.ids[:2] == [begin, begin]:
        message = f"the template writes the begin token {str(fit.tokenizer.bos_token)!r} twice"
        yield Mismatch(Problem(TEMPLATE, message, "take one of them out of the template"), fatal=False)


def _marks(fit: Fit) -> Found:
    """The template's own `generation` marks, where it has some, stand around the answers and nothing else."""
    if fit.probe is not None and (astray := marks_astray(fit.tokenizer, fit.probe)) is not None:
        message = f"its {{% generation %}} marks stand around {astray!r}, which is not the answer"
        fatal = fit.probe.by_marks
        yield Mismatch(Problem(TEMPLATE, message, "put them around the answer and its end", Exit.DATA), fatal=fatal)


def _prefix(fit: Fit) -> Found:
    """A conversation is the beginning of the same one with more turns."""
    if fit.probe is not None and fit.probe.rewrites:
        message = "the template writes earlier turns otherwise once a conversation goes on"
        fix = "each such answer is trained in a row of its own, as the model will see it"
        yield Mismatch(Problem(TEMPLATE, message, fix), fatal=False)


CHECKS: tuple[Callable[[Fit], Found], ...] = (
    _embedding, _adapter_tokens, _adapter_template, _padding, _split, _ends, _begin, _marks, _prefix,
)  # fmt: skip
