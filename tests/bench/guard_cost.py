"""What the guards of the training loop cost: the same steps with and without them, by turns, in one process.

    python tests/bench/guard_cost.py 8b-lora
    python tests/bench/guard_cost.py --device cpu --tiny --steps 4

The steps are those of `ftcore_trainer` in train_step.py, whose options and rows are taken; the last of a row's memory
settings counts. `--steps` of each kind (200 unless given) are waited for one by one, and as many are left alone, in
blocks of ten. Prints both medians and their ratio, and exits 1 where a ratio is above 1.01 on a GPU. Results also go to
`$OUT/guard-cost.json`.
"""

from __future__ import annotations

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

BLOCK = 10
"""Steps that are left alone at a time."""
ALLOWED = 1.01
STEPS = 200


def main(words: list[str]) -> int:
    """Measure, print, and judge."""
    found = options.arguments(words, __doc__)
    steps = found.steps if "--steps" in words else STEPS
    work = list(options.works(found).values())[-1]
    made = processes.located(work, found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    work = replace(work, **made, warmup=max(work.warmup, 5), steps=4 * steps)
    print(work.title(), flush=True)
    medians = measured(work, steps)
    ratios = {}
    for kind, (guarded, bare) in medians.items():
        ratios[kind] = guarded / bare
        print(f"{kind}: {1000 * guarded:.3f} ms guarded, {1000 * bare:.3f} ms bare, ratio {guarded / bare:.4f}")
    if out := os.environ.get("OUT"):
        kept = {"work": work.title(), "steps": steps, "seconds": medians, "ratios": ratios}
        Path(out, "guard-cost.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return int(work.device == "cuda" and max(ratios.values()) > ALLOWED)


def measured(work: Work, steps: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step with and without guards: waited for, and left alone."""
    from stepbench import trainers
    from stepbench.sides.ftcore import prepared
    from stepbench.sides.ftcore_trainer import made

    from ftcore import hooks as h
    from ftcore import pipeline

    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = prepared(work, scratch)
        loaded = pipeline.load(hooks, plan)
        trainer = made(hooks, plan, loaded, trainers.dataset(work, labels=True))
        turns = Turns(trainer, turns_of(work.warmup, steps), work.device == "cuda")
        trainer.add_callback(turns)
        hooks.first(h.ftcore_train, plan=plan, trainer=trainer)
    assert not turns.turns, f"{len(turns.turns)} turns were not made"
    return {kind: tuple(statistics.median(times[on]) for on in (True, False)) for kind, times in turns.times.items()}


def turns_of(warmup: int, steps: int) -> list[tuple[str, bool, int]]:
    """(kind, guarded, steps) of every turn; in every second pair the bare one comes first."""
    turns = [("", True, warmup)]
    for kind, size in (("waited for", 1), ("left alone", BLOCK)):
        for pair in range(max(steps // size, 1)):
            turns += [(kind, (pair + half) % 2 == 0, size) for half in (0, 1)]
    return turns


class Turns(TrainerCallback):
    """Switches the guards of a trainer off and on, and keeps the seconds of a step in every turn."""

    def __init__(self, trainer: Any, turns: list[tuple[str, bool, int]], gpu: bool) -> None:
        self.times: dict[str, dict[bool, list[float]]] = {kind: {True: [], False: []} for kind, _, _ in turns if kind}
        self.turns = turns
        self._trainer, self._gpu = trainer, gpu
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
        if self.turns:
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
