"""How long a step will take on a card, said from the plan alone: an estimate, good for choosing and not for comparing.

Work is divided by what the card could do, times a part of it that was fitted to the rows of docs/benchmarks.md (one
H100 and one H200, bf16): all of them are within 5 %. Other cards have other parts, so that their figures are rougher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftcore.cards import Card
from ftcore.config import Memory
from ftcore.forecast import ENDLESS, Forecast, Layout
from ftcore.memory import writes
from ftcore.store import sizes

PRODUCTS = 0.78
"""Part of a card's FLOP/s that large matrix products reach."""
ATTENDING = 0.5, 0.55
"""That attention reaches, forward and backward."""
HEAD = 0.4
"""That the head reaches: its logits are written in 32 bits and read again."""
ADAPTERS = 0.07
"""That LoRA's narrow products reach."""
BANDWIDTH = 0.65
"""Part of the memory's bandwidth that kernels between the products reach, as dequantization does."""
LAUNCHES = 3e-4
"""Seconds of a layer, forward and backward, that are there at any size: a third of them forward."""
TOUCHED = 10
"""Times that a layer's forward reads or writes its hidden states between the products; its backward twice as often."""
DEQUANTIZED = 2.5
"""Bytes read and written for a weight in 4 bits."""
UPDATED = 22
"""Bytes read and written for a trained weight in 32 bits by a step of AdamW besides its moments."""
WRITING = 0.6
"""Part of the memory's bandwidth that a step of writing reaches."""
LAUNCHED = 1.2e-5
"""Seconds of a layer in a step of writing that are there at any size."""


@dataclass(frozen=True)
class _Layer:
    """One decoder layer, in numbers."""

    weights: int
    """Of its products."""
    trained: int
    """Those of them that are trained themselves."""
    adapters: int
    window: int | None
    """Tokens that its attention looks back at most."""


@dataclass(frozen=True)
class Pace:
    """The seconds of a run's step on a card."""

    forecast: Forecast
    card: Card

    def step(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> float:
        """Seconds of an optimizer step of the plan's global batch, in micro-batches of that many rows."""
        trainer = self.forecast.plan.run.trainer
        assert trainer is not None
        micro = self.micro_batch(memory, rows, length, limit)
        return trainer.global_batch / rows * micro + self._optimizer + self._writing(trainer.global_batch, length)

    def tokens(self, rows: int, length: int) -> int:
        """Tokens that are learnt from in such a micro-batch."""
        return rows * self.forecast.passes.sequences * length

    def rate(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> float:
        """Tokens that are learnt from a second, in micro-batches of that many rows."""
        trainer = self.forecast.plan.run.trainer
        assert trainer is not None
        learnt = self.tokens(trainer.global_batch, length)
        return learnt / self.step(memory, rows, length, limit)

    def micro_batch(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> float:
        """Seconds of a forward and backward pass, and of the passes without a backward that belong to it."""
        passes = self.forecast.passes
        layout = self.forecast.layout(memory, rows, length, limit)
        sequences = rows * passes.sequences
        head = self._head(sequences * length)
        forward = [self._forward(layer, sequences, length) for layer in self._layers]
        # The logits, the gradient of the hidden states, that of a trained head, and the logits once more.
        products = 2 + (self.forecast.head_gradient > 0) + passes.logprobs
        seconds = sum(forward) + self._backward(layout, sequences, length, forward) + products * head
        seconds += passes.unlearnt / passes.times / passes.sequences * (sum(forward) + head)
        if memory is Memory.offload:
            seconds += self._fetched * (1 + passes.logprobs)
        return seconds

    # ------------------------------------------------------------------------------------------------------- a layer

    def _forward(self, layer: _Layer, rows: int, length: int) -> float:
        tokens = rows * length
        return (
            self._products(2 * tokens * layer.weights)
            + self._attended(layer, tokens, length) / (self.card.flops * ATTENDING[0])
            + 2 * tokens * layer.adapters / (self.card.flops * ADAPTERS)
            + self._between(tokens)
            + self._dequantized(layer)
            + LAUNCHES / 3
        )

    def _backward(self, layout: Layout, rows: int, length: int, forward: Sequence[float]) -> float:
        """Of all layers, with what is computed again and the copies that take longer than the layers."""
        tokens, seconds = rows * length, 0.0
        layers = zip(self._layers, self.forecast.layers, layout.levels, forward, strict=True)
        store, of_layer = layout.store, sizes(self.forecast.layers, rows, length)
        attended = 0 if store is None else store.attended
        for index, (layer, recomputing, level, before) in enumerate(layers):
            copied = of_layer.input if store is not None and store.away else 0
            if index < attended:
                level, copied = max(level, 1), copied + of_layer.attended
            copy = copied / self.card.host
            own = (
                self._products(2 * tokens * (layer.weights + layer.trained))
                + 2.5 * self._attended(layer, tokens, length) / (self.card.flops * ATTENDING[1])
                + 4 * tokens * layer.adapters / (self.card.flops * ADAPTERS)
                + 2 * self._between(tokens)
                + self._dequantized(layer)
                + LAUNCHES * 2 / 3
            )
            levels = recomputing.levels(rows, length)
            if again := levels[level].again:
                own += self._again(layer, tokens, length, again, level == 0)
            seconds += max(own, copy) + max(copy - before, 0.0)
        if layout.store is not None:
            seconds += layout.store.made_again * sum(forward) / max(len(forward), 1)
        return seconds

    def _again(self, layer: _Layer, tokens: int, length: int, again: float, attention: bool) -> float:
        """What is computed again of a layer; the least level computes attention again as well."""
        if not attention:
            return self._products(again)
        whole = min(2.0 * tokens * length * self._width, again)
        return (
            self._products(again - whole)
            + self._attended(layer, tokens, length) / (self.card.flops * ATTENDING[0])
            + 2 * tokens * layer.adapters / (self.card.flops * ADAPTERS)
            + self._between(tokens)
            + LAUNCHES / 3
        )

    def _products(self, operations: float) -> float:
        return operations / (self.card.flops * PRODUCTS)

    def _attended(self, layer: _Layer, tokens: int, length: int) -> float:
        """Floating-point operations of a forward through attention, of which each token looks back."""
        window = layer.window
        back = length / 2 if window is None or window >= length else window * (1 - window / (2 * length))
        return 4 * tokens * back * self._width

    def _between(self, tokens: int) -> float:
        """Norms, rotation, activation: a forward's."""
        text = self.forecast.model.config.get_text_config()
        inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
        inner = inner if isinstance(inner, int) else max(inner)
        keys = self.forecast.row_bytes // len(self._layers) // self.forecast.width
        columns = TOUCHED * int(text.hidden_size) + 2 * (self._width + keys) + 3 * int(inner)
        return 2.0 * tokens * columns / (self.card.bandwidth * BANDWIDTH)

    def _dequantized(self, layer: _Layer) -> float:
        if not self.forecast.dequantized:
            return 0.0
        return layer.weights * DEQUANTIZED / (self.card.bandwidth * BANDWIDTH)

    # ------------------------------------------------------------------------------------------------ everything else

    def _head(self, tokens: int) -> float:
        """One product with the head."""
        text = self.forecast.model.config.get_text_config()
        return 2.0 * tokens * int(text.vocab_size) * int(text.hidden_size) / (self.card.flops * HEAD)

    @property
    def _fetched(self) -> float:
        """Seconds in which the head comes from host memory."""
        return self.forecast.leaving[1] / self.card.host

    @property
    def _optimizer(self) -> float:
        moments = self.forecast.state_bytes
        width = UPDATED * self.forecast.trained_width / 4
        return self.forecast.trained * (width + 2 * moments) / (self.card.bandwidth * BANDWIDTH)

    def _writing(self, rows: int, length: int) -> float:
        """Seconds in which a step's completions are written: a step of each token reads weights and cache once."""
        passes, plan = self.forecast.passes, self.forecast.plan
        if not passes.written or not writes(plan):
            return 0.0
        wanted = rows * passes.sequences
        at_once = min(wanted, int(getattr(plan.run.generator, "batch", 8)))
        weights = 2.0 * sum(layer.weights for layer in self._layers) + self.forecast.head_weights
        cache = at_once * (length - passes.written / 2) * self.forecast.row_bytes
        token = (weights + cache) / (self.card.bandwidth * WRITING) + LAUNCHED * len(self._layers)
        return -(-wanted // at_once) * passes.written * token / passes.times

    @cached_property
    def _width(self) -> int:
        """Columns of all query heads."""
        text = self.forecast.model.config.get_text_config()
        return int(text.num_attention_heads) * int(
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )

    @cached_property
    def _layers(self) -> list[_Layer]:
        text: Any = self.forecast.model.config.get_text_config()
        modules = [module for module in self.forecast.model.modules() if hasattr(module, "ftcore_recompute")]
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(modules)
        window = getattr(text, "sliding_window", None)
        if window is not None and getattr(text, "layer_types", None) is None:
            kinds = ["sliding_attention"] * len(modules)
        found = []
        for module, kind in zip(modules, kinds, strict=True):
            matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2}
            lora = [p for name, p in matrices.items() if "lora_" in name]
            own = [p for name, p in matrices.items() if "lora_" not in name]
            found.append(
                _Layer(
                    weights=sum(p.numel() for p in own),
                    trained=sum(p.numel() for p in own if p.requires_grad),
                    adapters=sum(p.numel() for p in lora),
                    window=int(window) if window and kind == "sliding_attention" else None,
                )
            )
        return found
