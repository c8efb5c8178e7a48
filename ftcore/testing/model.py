"""What a model family keeps to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from ftcore.specs import Loaded, ModelFamily

CONVERSATION = [
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "Eight, in four pairs."},
    {"role": "user", "content": "And in Greek? Say: user assistant"},
    {"role": "assistant", "content": "Οκτώ.\n\n1. user\n2. assistant"},
]
"""Two answers, with line breaks, letters of several bytes, and words that a template uses itself."""
KERNEL_SETS = ("auto", "reference", "triton")
ADAPTERS = ("lora", "full")
DOCUMENTS = (9, 1, 17, 4, 13)
"""Lengths of packed documents: a single token, and some that are longer than the windows of tiny models."""


class ModelContract(PluginContract):
    """A family's tiny model is patched without a change of its maths, is adapted, saved, and formats conversations."""

    tolerance: ClassVar[float] = 1e-5
    """Relative distance, in norm, of the loss and of each gradient from plain transformers' in float32."""
    turn_end: ClassVar[str | None] = None
    """What the chat template puts after an answer; None for the tokenizer's end token."""
    conversation: ClassVar[Sequence[dict[str, str]]] = CONVERSATION
    """Messages that the chat template is tried on."""
    absent_targets: ClassVar[Sequence[str]] = ()
    """Names in `lora_targets` of layers that other checkpoints of the family have, and the tiny one does not."""
    ungraded: ClassVar[Sequence[str]] = ()
    """Parts of the names of parameters whose gradient may be zero or none, or next to it, by the family's own maths."""

    def tiny(self) -> list[str]:
        """Overrides that select the family's tiny model."""
        return [*self.selected(), "model.tiny=true", "model.dtype=float32"]

    def batch(self, model: Any) -> dict[str, torch.Tensor] | None:
        """Inputs with labels, images where the family reads them; override it for one that takes something else."""
        return runs.batch_with_images(self.tiny()) if self.family().vision else runs.batch_for(model)

    def plain(self) -> Loaded:
        """The tiny model as plain transformers has it, every weight trainable."""
        return runs.loaded([*self.tiny(), "adapter=full", "kernels=[]"])

    def family(self) -> ModelFamily:
        """What the plugin says of itself."""
        return runs.prepared(self.tiny())[1].family

    def test_tiny_model_is_of_the_family(self) -> None:
        """`tiny` makes a model of the first `model_types`, small, with room for the byte-level tokenizer."""
        from ftcore.bytes_tokenizer import VOCABULARY

        model: Any = self.plain().model
        assert model.config.model_type == self.family().model_types[0]
        assert model.config.get_text_config().vocab_size >= VOCABULARY
        assert sum(p.numel() for p in model.parameters()) < 5_000_000

    def test_every_role_is_in_the_model(self) -> None:
        """The class that each role names occurs."""
        classes = {cls.__name__ for module in self.plain().model.modules() for cls in type(module).__mro__}
        absent = [f"{role.name}: {role.module}" for role in self.family().roles if role.module not in classes]
        assert not absent

    @pytest.mark.parametrize("adapter", ADAPTERS)
    @pytest.mark.parametrize("kernel_set", KERNEL_SETS)
    def test_kernels_keep_loss_and_gradients(self, kernel_set: str, adapter: str) -> None:
        """With kernels, the loss and every gradient are plain transformers', with LoRA and for all weights."""
        maths.needs_triton(kernel_set)
        batch = self.batch(self.plain().model)
        words = [*self.tiny(), f"adapter={adapter}"]
        maths.assert_same_maths(words, kernel_set, self.tolerance, batch, self.ungraded)

    def test_lora_targets_are_in_the_model(self) -> None:
        """Each name in `lora_targets` is one of a linear layer, and gets an adapter."""
        adapted = runs.loaded([*self.tiny(), "adapter=lora"]).model
        targets = [name for name in self.family().lora_targets if name not in self.absent_targets]
        assert targets
        linear = {
            path.rpartition(".")[2] for path, m in self.plain().model.named_modules() if type(m).__name__ == "Linear"
        }
        assert set(targets) <= linear, f"linear layers are called {', '.join(sorted(linear))}"
        assert not linear & set(self.absent_targets), "absent_targets are there"
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert [t for t in targets if not any(f".{t}." in name for name in trained)] == []

    def test_lora_parameters_are_in_the_model(self) -> None:
        """Each of `lora_parameters` gets adapters of its own wherever it is, and nothing else among parameters does."""
        adapted = runs.loaded([*self.tiny(), "adapter=lora"]).model
        ends = tuple(f".{name}" for name in self.family().lora_parameters)
        expected = {name for name, _ in self.plain().model.named_parameters() if ends and name.endswith(ends)}
        assert all(any(name.endswith(end) for name in expected) for end in ends)
        found = {
            f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}"
            for path, module in adapted.named_modules()
            if type(module).__name__ == "ParamWrapper"
        }
        assert found == expected

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_every_trained_parameter_gets_a_gradient(self, adapter: str) -> None:
        """With no adapter at zero, every gradient is finite, and none is zero but for what `ungraded` names."""
        model = runs.loaded([*self.tiny(), f"adapter={adapter}"]).model
        runs.shake(model, trainable_only=True)
        maths.loss_and_gradients(model, self.batch(model) or {})
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert [name for name, gradient in trained.items() if gradient is None and not self._ungraded(name)] == []
        found = {name: gradient for name, gradient in trained.items() if gradient is not None}
        assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == []
        assert [name for name, gradient in found.items() if not gradient.any() and not self._ungraded(name)] == []

    def _ungraded(self, name: str) -> bool:
        return any(part in name for part in self.ungraded)

    def test_recomputation_keeps_gradients(self) -> None:
        """`memory=least` recomputes the forward pass, and gives the gradients of `memory=off`."""
        kept, again = (runs.loaded([*self.tiny(), f"memory={mode}"]).model for mode in ("off", "least"))
        runs.shake(kept, trainable_only=True)
        again.load_state_dict(kept.state_dict())
        batch = self.batch(kept) or {}
        maths.assert_same_step(maths.loss_and_gradients(again, batch), maths.loss_and_gradients(kept, batch), 1e-6)

    def test_packed_is_unpacked(self) -> None:
        """Documents in one row train as the same documents do in rows of their own, or the plan refuses packing."""
        words = [*self.tiny(), "+trainer=sft", "trainer.packing=true", f"trainer.max_length={sum(DOCUMENTS)}"]
        if problems := runs.refusals(words):
            assert [problem.key for problem in problems] == ["trainer.packing"]
            assert all(problem.message and problem.fix for problem in problems)
            return
        model: Any = runs.loaded([*self.tiny(), "adapter=full"]).model
        runs.shake(model)
        separate = [runs.document(length) for length in DOCUMENTS]
        labels = sum(int((one["labels"][:, 1:] != -100).sum()) for one in separate)
        whole = maths.loss_and_gradients(model, runs.packed(separate), labels)
        parts = maths.loss_and_gradients(model, separate, labels)
        maths.assert_same_step(whole, parts, self.tolerance)

    def test_three_steps_of_sft(self, tmp_path: Path) -> None:
        """A short run on the shipped rows takes its steps, and the loss falls."""
        from ftcore.api import run

        words = [*self.tiny(), "+trainer=sft", "trainer.max_steps=3", *runs.SHORT, "prompts=[]"]
        metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
        assert metrics["eval_loss"] < metrics["eval_loss_before"]

    def test_coverage_is_what_is_claimed(self) -> None:
        """`ftcore plugins` lists a kernel for just those roles that one is put on, and reasons for all others."""
        from ftcore.coverage import coverage

        loaded = runs.loaded([*self.tiny(), "kernels=[reference]"])
        whole = {claim.role for claim in loaded.patches.claims} & {"decoder_layer"}
        inside = {skip.role for skip in loaded.patches.skipped if "inside" in skip.reason} if whole else set()
        listed = {row.role.name for row in coverage(self.family()) if "reference" in row.sets}
        assert listed == {claim.role for claim in loaded.patches.claims} | inside
        assert all(row.reasons for row in coverage(self.family()) if not row.sets)

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_saved_and_loaded_says_the_same(self, adapter: str, tmp_path: Path) -> None:
        """What a run saves gives the same logits when it is loaded again."""
        overrides = [*self.tiny(), f"adapter={adapter}"]
        model: Any = (first := runs.loaded(overrides)).model
        runs.shake(model, trainable_only=True)
        model.save_pretrained(tmp_path / "trained")
        first.tokenizer.save_pretrained(tmp_path / "trained")
        maths.assert_same_logits(runs.reloaded(overrides, str(tmp_path)), first, 1e-6, self.batch(model))

    def test_merged_says_the_same(self, tmp_path: Path) -> None:
        """The merged checkpoint is one of the family's, and gives the logits of base and adapter."""
        from ftcore.merge import write_merged

        first = runs.loaded([*self.tiny(), "kernels=[]"])
        runs.shake(first.model, trainable_only=True)
        write_merged(first.model, first.tokenizer, tmp_path / "merged", "float32")
        words = [*self.selected(), f"model.path='{tmp_path / 'merged'}'", "model.dtype=float32", "kernels=[]"]
        again = runs.loaded([*words, "adapter=full"])
        maths.assert_same_logits(again, first, self.tolerance, self.batch(first.model))

    def test_chat_template_trains_the_answers_and_nothing_else(self) -> None:
        """The trained tokens are the assistant's words and the end of its turn, one run of tokens per answer."""
        from ftcore.tasks.preview import pieces
        from ftcore.tokens import tokenize_row

        tokenizer = self.plain().tokenizer
        row = tokenize_row(tokenizer, {"messages": list(self.conversation)}, "messages", 10_000)
        trained = [text for text, is_trained in pieces(row["input_ids"], row["labels"], tokenizer) if is_trained]
        end = tokenizer.eos_token if self.turn_end is None else self.turn_end
        assert trained == [m["content"] + str(end) for m in self.conversation if m["role"] == "assistant"]

    def test_a_second_model_stays_as_it_was(self) -> None:
        """Patching and adapting one model changes nothing of transformers nor of another model in the process."""
        other = self.plain()
        home = sys.modules[type(other.model).__module__]
        names, classes = dict(vars(home)), {type(m): dict(vars(type(m))) for m in other.model.modules()}
        batch = self.batch(other.model) or {}
        before = runs.logits_of(other.model, batch)
        maths.loss_and_gradients(runs.loaded([*self.tiny(), "kernels=[reference]"]).model, batch)
        assert [n for n, value in names.items() if vars(home).get(n) is not value] == []
        changed = [
            cls.__name__ for cls, was in classes.items() if any(vars(cls).get(n) is not v for n, v in was.items())
        ]
        assert changed == []
        assert not any("forward" in vars(module) for module in other.model.modules())
        assert maths.apart(runs.logits_of(other.model, batch), before) == 0
