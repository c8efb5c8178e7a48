"""A whole GRPO step, generation included: ftcore's, and TRL's as it comes."""

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
    """The inner form of `grpo_whole.py`: `locate` makes the checkpoint folder, the others train."""

    def run(text: str) -> dict[str, Any]:
        given = json.loads(text)
        if side == "locate":
            from stepbench.folder import locate

            return {"status": "ok", **locate(Work(**{name: given[name] for name in Work.__dataclass_fields__}))}
        from stepbench.sides import versions

        work = TrainerWork(**given)
        found = measured(work) if side == "ftcore" else of_trl(work, continuous=side == "trl-continuous")
        return {"status": "ok", **found, "versions": versions()}

    processes.answer(lambda: None if side == "locate" else _imports(side), run)


def _imports(side: str) -> None:
    import trl
    from stepbench import sides

    sides.imports(side.partition("-")[0])
    _ = trl.GRPOTrainer  # imported when it is first asked for


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
        clock = Clock(work)
        parts = Parts(clock, generator, loaded.model.get_base_model().generation_config)
        given = rows.dataset(work, loaded.tokenizer)
        trained(hooks, plan, loaded, given, Steps(clock, work), [rows.by_place], parts)
    return {
        **clock.result(),
        "weights_bytes": weights(loaded.model),
        "dtype": plan.dtype,
        "trained": sum(p.numel() for p in loaded.model.parameters() if p.requires_grad),
        "ftcore": " ".join(overrides(work, "SCRATCH")),
        "gpu": torch.cuda.get_device_name() if work.device == "cuda" else "CPU",
    }


def of_trl(work: TrainerWork, continuous: bool) -> dict[str, Any]:
    """TRL's trainer as it comes, by transformers' `generate` or its continuous batching."""
    import torch
    import trl
    from stepbench.sides import hf
    from transformers import AutoTokenizer

    tokenizer, clock = AutoTokenizer.from_pretrained(work.folder), Clock(work)

    class Timed(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            clock.begin_generation()
            found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            if not continuous:
                clock.check(prompt_ids, found[0])
            clock.lap("generation")
            return found

    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch,
            model_init_kwargs=hf.options(work),
            per_device_train_batch_size=work.rows,
            num_generations=work.group,
            max_completion_length=work.length - work.prompt,
            max_steps=work.total,
            use_transformers_continuous_batching=continuous,
            # TRL cuts completions at the tokenizer's end token, wherever that comes from. Continuous batching leaves no
            # token out: about one completion in five hundred ends early.
            generation_kwargs={
                "eos_token_id": None,
                "suppress_tokens": None if continuous else [tokenizer.eos_token_id],
            },
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"use_cpu": True, "bf16": False} if work.device == "cpu" else {}),
        )
        trainer = Timed(
            model=work.folder, args=config, train_dataset=rows.dataset(work, tokenizer), processing_class=tokenizer,
            peft_config=hf.lora(work), reward_funcs=rows.by_place, callbacks=[Steps(clock, work)],
        )  # fmt: skip
        trainer.train()
    return {
        **clock.result(),
        "weights_bytes": weights(trainer.model),
        "dtype": work.dtype,
        "gpu": torch.cuda.get_device_name() if work.device == "cuda" else "CPU",
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def weights(model: Any) -> int:
    """Bytes of the model and its adapter."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class Endless:
    """A tokenizer whose end token is outside the vocabulary, so that random weights never write it."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Clock:
    """Seconds and peaks of memory of a step's two parts."""

    def __init__(self, work: TrainerWork) -> None:
        self._work, self._gpu = work, work.device == "cuda"
        self._last = 0.0
        self._seconds: dict[str, list[float]] = {"generation": [], "training": []}
        self._peaks = {"generation": 0, "training": 0}
        self._graphs = 0

    def begin_generation(self) -> None:
        """Training ends here, but for the first step, before which there was none."""
        self.lap("training" if self._last else "")

    def check(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
        """Raises SystemExit unless every completion is as long as it may be."""
        asked = {self._work.prompt}, {self._work.length - self._work.prompt}
        if asked != (lengths := ({*map(len, prompts)}, {*map(len, completions)})):
            raise SystemExit(f"tokens of prompts and completions are {lengths}, not {asked}")

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


class Parts:
    """A generator that passes everything on, by the clock."""

    def __init__(self, clock: Clock, generator: Any, settings: Any) -> None:
        self._clock, self._generator, self._settings = clock, generator, settings

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Any) -> Any:
        """As the generator's own, all of full length."""
        found = self._generator.generate(prompt_ids, sampling)
        self._clock.check(prompt_ids, found.ids)
        return found

    def begin_rollout(self) -> None:
        """As the generator's own."""
        self._clock.begin_generation()
        self._settings.eos_token_id = None  # transformers' Trainer has given it the tokenizer's
        self._generator.begin_rollout()

    def end_rollout(self) -> None:
        """Generation ends here."""
        self._generator.end_rollout()
        self._clock.lap("generation")

    def weights_changed(self) -> None:
        """As the generator's own."""
        self._generator.weights_changed()


class Steps(TrainerCallback):
    """Says when the last step ends, which may be before all are made."""

    def __init__(self, clock: Clock, work: TrainerWork) -> None:
        self._clock, self._work = clock, work
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The budget begins."""
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The budget may be spent."""
        spent = 0 < self._work.budget < time.perf_counter() - self._start
        if spent and state.global_step > self._work.warmup:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything is saved."""
        self._clock.lap("training")
