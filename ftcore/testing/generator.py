"""What a generator keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ftcore.answers import end_ids
from ftcore.specs import Batching, Conversing, Generator, Loaded, Sampling, Streaming
from ftcore.testing import runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPTS = ("Hi", "Name a colour.", "Count to ten, please: ")
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


class GeneratorContract(PluginContract):
    """Completions end where they should, greedy ones are certain, and the model is left as it was."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select the model that it is tried on."""

    def made(self) -> tuple[Generator, Loaded, list[list[int]]]:
        """The generator over a tiny model, and prompts of unequal length."""
        from ftcore import hooks as h
        from ftcore import pipeline

        hooks, plan = runs.prepared([*self.base, *self.selected()])
        loaded = pipeline.load(hooks, plan)
        runs.shake(loaded.model)
        generator = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
        tokenizer: Any = loaded.tokenizer
        return generator, loaded, [tokenizer(text)["input_ids"] for text in PROMPTS]

    def test_completions_end_by_the_rules(self) -> None:
        """One per prompt, no longer than asked for; the end token comes last, and only a cut-off one has none."""
        import torch

        generator, loaded, prompts = self.made()
        ends = set(end_ids(loaded.model, loaded.tokenizer))
        torch.manual_seed(0)
        generator.begin_rollout()
        completions = generator.generate(prompts * 12, Sampling(max_new_tokens=48))
        generator.end_rollout()
        assert len(completions.ids) == len(prompts) * 12
        assert all(0 < len(ids) <= 48 for ids in completions.ids)
        assert all(len(ids) == 48 or ids[-1] in ends for ids in completions.ids)
        assert not any(token in ends for ids in completions.ids for token in ids[:-1])
        assert any(ids[-1] in ends for ids in completions.ids), "none of the sampled completions ended by itself"
        if completions.logprobs is not None:
            assert [len(row) for row in completions.logprobs] == [len(row) for row in completions.ids]
            assert all(value <= 0 for row in completions.logprobs for value in row)

    def test_temperature_zero_is_certain(self) -> None:
        """Greedy completions repeat, in any order and whatever else is in the batch."""
        generator, _, prompts = self.made()
        together = generator.generate(prompts, GREEDY).ids
        assert generator.generate(prompts, GREEDY).ids == together
        assert generator.generate(prompts[::-1], GREEDY).ids == together[::-1]
        assert [generator.generate([prompt], GREEDY).ids[0] for prompt in prompts] == together

    def test_any_number_of_prompts(self) -> None:
        """A generator that says how many it completes at once takes one more, and completes each in its place."""
        generator, _, prompts = self.made()
        if not isinstance(generator, Batching):
            return
        assert generator.at_once > 0
        shortly = Sampling(max_new_tokens=2, temperature=0.0)
        apart, times = generator.generate(prompts, shortly).ids, generator.at_once // len(prompts) + 1
        assert generator.generate(prompts * times, shortly).ids == apart * times

    def test_a_stream_is_the_completion_in_pieces(self) -> None:
        """Of a generator that streams: every token is shown once, and what `show` raises leaves it usable."""
        generator, _, prompts = self.made()
        if not isinstance(generator, Streaming):
            return
        whole = generator.generate(prompts, GREEDY).ids
        for prompt, ids in zip(prompts, whole, strict=True):
            assert self._streamed(generator, prompt) == ids

        def stop(new: list[int]) -> None:
            raise InterruptedError

        try:
            generator.stream(prompts[0], GREEDY, stop)
        except InterruptedError:
            pass
        else:
            raise AssertionError("what `show` raises did not come through")
        assert self._streamed(generator, prompts[0]) == whole[0]

    def test_a_conversation_streams_the_same(self) -> None:
        """Of a generator that keeps what it has read: turns go on, are taken back, and are other ones."""
        generator, loaded, prompts = self.made()
        if not isinstance(generator, Conversing):
            return
        talk, other, first = generator.conversation(), *prompts[:2]
        said = self._streamed(talk, first)
        turns = [[*first, *said, *other], [*first, *said], first, other, [*first, *said, *other]]
        streamed = [said, *(self._streamed(talk, turn) for turn in turns)]
        assert streamed == generator.generate([first, *turns], GREEDY).ids
        runs.shake(loaded.model)
        generator.weights_changed()
        after = generator.generate([turns[0]], GREEDY).ids[0]
        assert [self._streamed(generator.conversation(), turns[0]), self._streamed(talk, turns[0])] == [after, after]

    @staticmethod
    def _streamed(generator: Streaming, prompt: list[int]) -> list[int]:
        """What was shown, which is what is returned."""
        shown: list[int] = []
        assert generator.stream(prompt, GREEDY, shown.extend) == shown
        return shown

    def test_model_is_left_as_it_was(self) -> None:
        """Training mode, gradients and weights are not touched."""
        import torch

        generator, loaded, prompts = self.made()
        weights = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
        trainable = [p.requires_grad for p in loaded.model.parameters()]
        for mode in (True, False):
            loaded.model.train(mode)
            generator.generate(prompts, GREEDY)
            assert loaded.model.training is mode
        assert [p.requires_grad for p in loaded.model.parameters()] == trainable
        assert all(torch.equal(p, weights[name]) for name, p in loaded.model.named_parameters())

    def test_new_weights_are_used(self) -> None:
        """After `weights_changed`, completions come from the weights as they are now."""
        generator, loaded, prompts = self.made()
        before = generator.generate(prompts, GREEDY).ids
        runs.shake(loaded.model)
        generator.weights_changed()
        assert generator.generate(prompts, GREEDY).ids != before
