"""What the guards of the training loop cost: the same steps with and without them, by turns, in one process.

    python tests/bench/guard_cost.py 8b-lora
    python tests/bench/guard_cost.py 8b-lora --kinds waited --limit 280
    python tests/bench/guard_cost.py --device cpu --tiny --steps 4

The steps are those of `ftcore_trainer` in train_step.py, whose options and rows are taken; the last of a row's memory
settings counts. `--steps` of each kind (200 unless given) are waited for one by one, and as many are left alone, in
blocks of ten; `--kinds` takes one of them. Prints both medians and their ratio, and exits 1 where a ratio is above 1.01
on a GPU. After `--limit` seconds, and on SIGTERM, it says what it has. Results also go to `$OUT/guard-cost.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepbench import options, processes
from stepbench.works import Work
from transformers import TrainerCallback

from ftcore.guards.skipping import innermost
from ftcore.preemption import Preempted

SIZES = {"waited": 1, "left": 10}
"""Kind to the steps of a turn: waited for one by one, or left alone for so many."""
NAMES = {"waited": "waited for", "left": "left alone"}
ALLOWED = 1.01
STEPS = 200
LIMIT = 540
"""Seconds, unless `--limit` is given."""

Times = dict[str, dict[bool, list[float]]]
"""Kind to seconds of a step in every turn, with guards (True) and without."""


def main(words: list[str]) -> int:
    """Measure, print, and judge."""
    until = time.monotonic()
    found = options.arguments(words, __doc__, own_options)
    until += found.limit
    kinds = found.kinds.split(",")
    if strange := [kind for kind in kinds if kind not in SIZES]:
        raise SystemExit(f"--kinds takes {', '.join(SIZES)}, not '{strange[0]}'")
    steps = found.steps if "--steps" in words else STEPS
    work = list(options.works(found).values())[-1]
    made = processes.located(work, found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    work = replace(work, **made, warmup=max(work.warmup, 5), steps=2 * len(kinds) * steps)
    print(work.title(), flush=True)
    times = measured(work, turns_of(work.warmup, steps, kinds), until)
    print("\n".join(said(times)) or "nothing was measured", flush=True)
    keep(work, steps, times)
    cost = ratios(times)
    return int(len(cost) < len(kinds) or (work.device == "cuda" and max(cost.values()) > ALLOWED))


def own_options(parser: argparse.ArgumentParser) -> None:
    """What train_step.py has not."""
    parser.add_argument("--kinds", default=",".join(SIZES), help="steps that are waited for, or left alone, or both")
    parser.set_defaults(limit=LIMIT)


def said(times: Times) -> list[str]:
    """A line for every kind that was measured both ways."""
    lines = []
    for kind, ratio in ratios(times).items():
        on, off = (
            f"{1000 * statistics.median(times[kind][guarded]):.3f} ms {word} ({len(times[kind][guarded])} x "
            f"{SIZES[kind]} steps)"
            for guarded, word in ((True, "guarded"), (False, "bare"))
        )
        lines.append(f"{NAMES[kind]}: {on}, {off}, ratio {ratio:.4f}")
    return lines


def ratios(times: Times) -> dict[str, float]:
    """Median with guards over that without, of the kinds that have both."""
    return {
        kind: statistics.median(both[True]) / statistics.median(both[False])
        for kind, both in times.items()
        if both[True] and both[False]
    }


def keep(work: Work, steps: int, times: Times) -> None:
    """Write them into `$OUT`."""
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        seconds = {kind: {"guarded": both[True], "bare": both[False]} for kind, both in times.items()}
        kept = {"work": work.title(), "steps": steps, "seconds": seconds, "ratios": ratios(times)}
        Path(out, "guard-cost.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def measured(work: Work, planned: list[tuple[str, bool, int]], until: float) -> Times:
    """Seconds of a step in every turn that was made by `until` (monotonic), or before the process was told to stop."""
    from stepbench import trainers
    from stepbench.sides.ftcore import prepared
    from stepbench.sides.ftcore_trainer import made

    from ftcore import hooks as h
    from ftcore import pipeline

    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = prepared(work, scratch)
        loaded = pipeline.load(hooks, plan)
        trainer = made(hooks, plan, loaded, trainers.dataset(work, labels=True))
        turns = Turns(trainer, planned, work.device == "cuda", until)
        trainer.add_callback(turns)
        try:
            hooks.first(h.ftcore_train, plan=plan, trainer=trainer)
        except Preempted as told:
            print(told.args[0].partition("\n")[0], flush=True)
    if turns.turns:
        print(f"{len(turns.turns)} of {len(planned)} turns were not made", flush=True)
    return turns.times


def turns_of(warmup: int, steps: int, kinds: list[str]) -> list[tuple[str, bool, int]]:
    """(kind, guarded, steps) of every turn; in every second pair the bare one comes first."""
    turns = [("", True, warmup)]
    for kind in kinds:
        for pair in range(max(steps // SIZES[kind], 1)):
            turns += [(kind, (pair + half) % 2 == 0, SIZES[kind]) for half in (0, 1)]
    return turns


class Turns(TrainerCallback):
    """Switches the guards of a trainer off and on, and keeps the seconds of a step in every turn."""

    def __init__(self, trainer: Any, turns: list[tuple[str, bool, int]], gpu: bool, until: float) -> None:
        self.times: Times = {kind: {True: [], False: []} for kind, _, _ in turns if kind}
        self.turns = list(turns)
        self._trainer, self._gpu, self._until = trainer, gpu, until
        self._done, self._start = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the warm-up, with guards."""
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with the next turn after the last step of one."""
        if not self.turns:
            return
        kind, guarded, size = self.turns[0]
        self._done += 1
        if self._done < size:
            return
        self._wait()
        if kind:
            self.times[kind][guarded].append((time.perf_counter() - self._start) / size)
        self.turns.pop(0)
        self._done = 0
        if self.turns and time.monotonic() < self._until:
            self._begin()
        else:
            control.should_training_stop = True

    def _begin(self) -> None:
        guarded = self._trainer.guarded = self.turns[0][1]
        if not guarded:  # what guarded steps leave behind
            self._trainer._pending = None
            vars(innermost(self._trainer.optimizer)).pop("found_inf", None)
        self._wait()
        self._start = time.perf_counter()

    def _wait(self) -> None:
        import torch

        if self._gpu:
            torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
