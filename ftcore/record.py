"""The run folder: what is written there, and when."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from ftcore import report
from ftcore.artifacts import RUN_FILE, listed, show_artifacts, write_state
from ftcore.composition import record
from ftcore.config import RunConfig
from ftcore.drift import fingerprints
from ftcore.errors import Exit, FtcoreError
from ftcore.locks import held
from ftcore.patching import INSIDE
from ftcore.paths import claim_run_dir, whole_folder
from ftcore.specs import KeepsBeside, Loaded, PatchReport, Plan, RunResult, TrainReport

TRAINED = "trained"
"""Folder with the adapter, or the full model, that a run trained."""
VERSIONS = ("ftcore", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "triton")


class Stopwatch:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to `name`."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def claimed(plan: Plan) -> Plan:
    """The plan with its run folder made; a folder that ftcore numbers is this run's alone."""
    if plan.run.output_dir is None:
        return replace(plan, output_dir=claim_run_dir(plan.output_dir))
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    return plan


def with_absolute_paths(run: RunConfig) -> RunConfig:
    """The config as it can be used from any folder: files of the user's by their whole path."""

    def whole(text: str) -> str:
        name, colon, function = text.rpartition(":") if ".py:" in text else (text, "", "")
        return str(Path(name).expanduser().resolve()) + colon + function if Path(name).expanduser().exists() else text

    return replace(run, plugins=[whole(p) for p in run.plugins], rewards=[whole(r) for r in run.rewards])


class RunFolder:
    """Writes config.yaml and run.json at the start, and the outcome at the end, also of a run that fails."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._path = plan.output_dir
        self._state: dict[str, Any] = {}
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        self._held.enter_context(held(self._path))
        record(with_absolute_paths(self._plan.run), self._path)
        self._state = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: _version(name) for name in VERSIONS},
            "python": platform.python_version(),
            "device": self._plan.device.name,
            "dtype": self._plan.dtype,
            "plugins": [asdict(info) for info in self._plan.plugins],
            "inputs": fingerprints(self._plan),
        }
        self._write()
        report.note(f"run folder: {self._path}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            told = isinstance(error, FtcoreError) and error.code == Exit.PREEMPTED
            status = "stopped" if told or issubclass(kind, KeyboardInterrupt) else "failed"
            self._state |= {"status": status, "error": f"{kind.__name__}: {error}"}
            self._write()
        self._held.close()

    def show_patches(self, patches: PatchReport) -> None:
        """Print and record which kernels were put where."""
        self._state["patches"] = {
            "claims": [asdict(claim) for claim in patches.claims],
            "skipped": [asdict(skip) for skip in patches.skipped],
        }
        counts = patches.counts()
        text = ", ".join(f"{kernel} on {count}" for (_, kernel), count in counts.items()) or "none"
        report.note(f"kernels: {text}")
        for skip in (skip for skip in patches.skipped if skip.reason != INSIDE):  # a kernel computes these as well
            report.note(f"  no kernel for {skip.role} ({skip.module}): {skip.reason}")

    def save_trained(self, loaded: Loaded, trainer: Any) -> None:
        """Keep the adapter, or the full model, the tokenizer, and what the trainer has beside: what `run=FOLDER` loads
        again."""
        model: Any = loaded.model
        with whole_folder(self._path / TRAINED) as folder:
            model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            if isinstance(trainer, KeepsBeside):
                trainer.save_beside(folder)

    def finish(self, result: RunResult, trained: TrainReport) -> None:
        """Record and print the outcome."""
        self._state |= {
            "status": "done",
            "steps": trained.steps,
            "metrics": {name: _finite(value) for name, value in result.metrics.items()},
            "timings": dict(result.timings),
            "artifacts": [listed(a) for a in result.artifacts],
            "answers": [asdict(answer) for answer in result.answers],
        }
        self._write()
        spec, form = self._plan.trainer, self._plan.format
        speaks = form is not None and form.shape in self._plan.family.row_tokenizers
        talks = (spec is None or spec.auto_class is None) and not speaks
        show_result(result, spec.measures if spec else (), talks=talks)

    def _write(self) -> None:
        write_state(self._path / RUN_FILE, self._state)


def show_result(result: RunResult, measures: Sequence[str] = (), talks: bool = True) -> None:
    """The outcome as a person reads it.

    :param measures: What the trainer measured besides the loss.
    :param talks: Whether the trained model answers prompts.
    """
    report.heading("Result")
    measured = [name for measure in measures for name in (f"eval_{measure}_before", f"eval_{measure}")]
    losses = ("loss_first", "loss_last", "eval_loss_before", "eval_loss")
    shown = (*losses, *measured, "reward_first", "reward_last", "train_seconds")
    report.table((name, f"{result.metrics[name]:.4g}") for name in shown if name in result.metrics)
    for answer in result.answers:
        report.heading(f"Prompt: {answer.prompt}")
        report.note("  before:")
        report.paragraph(answer.before)
        report.note("  after:")
        report.paragraph(answer.after)
    trained = result.output_dir / TRAINED
    hint = f"talk to it: ftcore chat run={result.output_dir}" if talks else ""
    show_artifacts(result.artifacts, [("trained", trained, "", hint)])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
