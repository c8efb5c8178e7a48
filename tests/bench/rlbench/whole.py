"""A whole GRPO step of ftcore's, generation included."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from stepbench import processes
from stepbench.loop import of_graphs
from stepbench.sides.ftcore_trainer import trained
from stepbench.works import Work
from transformers import TrainerCallback

from rlbench import rows
from rlbench.sides.ftcore import overrides
from rlbench.works import TrainerWork


def inner(side: str) -> None:
    """The inner form of `grpo_whole.py`: `locate` makes the checkpoint folder, `whole` trains."""

    def run(text: str) -> dict[str, Any]:
        given = json.loads(text)
        if side == "locate":
            from stepbench.folder import locate

            return {"status": "ok", **locate(Work(**{name: given[name] for name in Work.__dataclass_fields__}))}
        from stepbench.sides import versions

        return {"status": "ok", **measured(TrainerWork(**given)), "versions": versions()}

    processes.answer(lambda: None, run)


def measured(work: TrainerWork) -> dict[str, Any]:
    """Seconds of each step's two parts, and the peaks of memory from the first step on."""
    import torch

    from ftcore import hooks as h
    from ftcore import pipeline
    from ftcore.api import validated

    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = pipeline.prepare(validated(overrides(work, scratch)))
        loaded = pipeline.load(hooks, plan)
        endless = Endless(loaded.tokenizer, len(loaded.tokenizer) + loaded.model.config.vocab_size)
        generator = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=endless)
        parts = Parts(work, generator, loaded.model.get_base_model().generation_config)
        given = rows.dataset(work, loaded.tokenizer)
        trained(hooks, plan, loaded, given, Steps(parts), [rows.by_place], parts)
    return {
        **parts.result(),
        "dtype": plan.dtype,
        "trained": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
        "ftcore": " ".join(overrides(work, "SCRATCH")),
        "gpu": torch.cuda.get_device_name() if work.device == "cuda" else "CPU",
    }


class Endless:
    """A tokenizer whose end token is outside the vocabulary, so that random weights never write it."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Parts:
    """A generator that passes everything on, and looks at clock and memory where generation begins and ends."""

    def __init__(self, work: TrainerWork, generator: Any, settings: Any) -> None:
        self._work, self._generator, self._settings = work, generator, settings
        self._gpu = work.device == "cuda"
        self._last = 0.0
        self._seconds: dict[str, list[float]] = {"generation": [], "training": []}
        self._peaks = {"generation": 0, "training": 0}
        self._graphs = 0

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Any) -> Any:
        """Raises SystemExit unless every completion is as long as it may be."""
        found = self._generator.generate(prompt_ids, sampling)
        asked = {self._work.prompt}, {self._work.length - self._work.prompt}
        if asked != (lengths := ({*map(len, prompt_ids)}, {*map(len, found.ids)})):
            raise SystemExit(f"tokens of prompts and completions are {lengths}, not {asked}")
        return found

    def begin_rollout(self) -> None:
        """Training ends here, but for the first step, before which there was none."""
        self.lap("training" if self._last else "")
        self._settings.eos_token_id = None  # transformers' Trainer has given it the tokenizer's
        self._generator.begin_rollout()

    def end_rollout(self) -> None:
        """Generation ends here."""
        self._generator.end_rollout()
        self.lap("generation")

    def weights_changed(self) -> None:
        """As the generator's own."""
        self._generator.weights_changed()

    def lap(self, part: str) -> None:
        """The part that ends here."""
        import torch

        if self._gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            self._seconds[part].append(now - self._last)
        if part and self._gpu:
            self._peaks[part] = max(self._peaks[part], torch.cuda.max_memory_allocated())
            self._graphs = max(self._graphs, of_graphs())
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        self._last = now

    def result(self) -> dict[str, Any]:
        """Medians after warm-up; peaks of all steps."""
        medians = {part: statistics.median(s[self._work.warmup :]) for part, s in self._seconds.items()}
        return {
            "seconds": {part: [round(one, 3) for one in s] for part, s in self._seconds.items()},
            **{f"{part}_s": seconds for part, seconds in medians.items()},
            **{f"{part}_bytes": peak for part, peak in self._peaks.items()},
            "graphs_bytes": self._graphs,
            "peak_bytes": max(self._peaks.values()) + self._graphs,
        }


class Steps(TrainerCallback):
    """Says when the last step ends."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything is saved."""
        self._parts.lap("training")
