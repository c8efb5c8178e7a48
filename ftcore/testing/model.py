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
KERNEL_SETS = ("reference", "triton")
ADAPTERS = ("lora", "full")


class ModelContract(PluginContract):
    """A family's tiny model is patched without a change of its maths, is adapted, saved, and formats conversations."""

    tolerance: ClassVar[float] = 1e-5
    """Relative distance, in norm, of the loss and of each gradient from plain transformers' in float32."""
    turn_end: ClassVar[str | None] = None
    """What the chat template puts after an answer; None for the tokenizer's end token."""
    conversation: ClassVar[Sequence[dict[str, str]]] = CONVERSATION
    """Messages that the chat template is tried on."""

    def tiny(self) -> list[str]:
        """Overrides that select the family's tiny model."""
        return [*self.selected(), "model.tiny=true", "model.dtype=float32"]

    def batch(self, model: Any) -> dict[str, torch.Tensor] | None:
        """Inputs with labels; override it for a family that takes more than token ids."""
        return runs.batch_for(model)

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
        maths.assert_same_maths([*self.tiny(), f"adapter={adapter}"], kernel_set, self.tolerance, batch)

    def test_lora_targets_are_in_the_model(self) -> None:
        """Each name in `lora_targets` is one of a linear layer, and gets an adapter."""
        adapted = runs.loaded([*self.tiny(), "adapter=lora"]).model
        targets = self.family().lora_targets
        assert targets
        linear = {
            path.rpartition(".")[2] for path, m in self.plain().model.named_modules() if type(m).__name__ == "Linear"
        }
        assert set(targets) <= linear, f"linear layers are called {', '.join(sorted(linear))}"
        trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert [t for t in targets if not any(f".{t}." in name for name in trained)] == []

    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_saved_and_loaded_says_the_same(self, adapter: str, tmp_path: Path) -> None:
        """What a run saves gives the same logits when it is loaded again."""
        overrides = [*self.tiny(), f"adapter={adapter}"]
        model: Any = (first := runs.loaded(overrides)).model
        runs.shake(model, trainable_only=True)
        model.save_pretrained(tmp_path / "trained")
        first.tokenizer.save_pretrained(tmp_path / "trained")
        maths.assert_same_logits(runs.reloaded(overrides, str(tmp_path)), first, 1e-6)

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
