"""Times a training step of DPO, KTO and GRPO by TRL as it comes and by ftcore's own trainers, in a process each.

    python tests/bench/preference_step.py --ahead
    python tests/bench/preference_step.py --trainers dpo --memory least --profile
    python tests/bench/preference_step.py --trainers grpo --sides ftcore --memory least --shared

Random weights of a real shape, LoRA on all that the family declares, rows of letters that are exactly so many tokens
long, which TRL tokenizes itself on both sides. GRPO's completions and rewards are given and the same on both sides, so
that its step is the training alone. Median of the timed steps after warm-up; peak is `torch.cuda.max_memory_allocated`
after warm-up, and `above` is it less what was allocated when model and adapter were loaded. TRL has its own defaults,
gradient checkpointing and its fused head among them; weights are 16 bits on both sides.
Results also go to `$OUT/preference-SHAPE-LENGTH.json`, with `--profile` the kernels to `$OUT/profile-TRAINER.txt`.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlbench import options, sides, table
from rlbench.works import TrainerWork
from stepbench import processes, profiling
from stepbench.table import line, machine
from stepbench.works import Work

Job = tuple[str, str, str, bool, str]
"""Trainer, side, memory, whether prompts are read once, label."""


def main(words: list[str]) -> int:
    """Run every side of every trainer in its own process, and print a table for each trainer."""
    if words[:1] == ["--inner"]:
        sides.inner(words[1])
        return 0
    found = options.arguments(words, __doc__)
    planned, script = jobs(found), Path(__file__).resolve()
    waiting = [processes.Process(side, found.device, script=script) for _, side, *_ in planned] if found.ahead else []
    made = located(options.work(found, "dpo"), found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    works = {trainer: replace(options.work(found, trainer), **made) for trainer in found.trainers.split(",")}
    for process in waiting:
        process.ready()
    results: dict[str, table.Results] = {trainer: {} for trainer in works}
    for trainer, side, memory, shared, label in planned:
        if not results[trainer]:
            print(works[trainer].title(), flush=True)
        start = time.monotonic()
        process = waiting.pop(0) if waiting else processes.Process(side, found.device, script=script)
        work = replace(works[trainer], memory=within(memory, results[trainer].get("trl")), shared=shared)
        result = {**process.run(work.text(), found.limit), "memory": work.memory}
        results[trainer][label] = {**result, "seconds": time.monotonic() - start}
        print(line(label, results[trainer][label]), flush=True)
        keep(found, words, works, results)
    for trainer, of_trainer in results.items():
        print(f"\n{works[trainer].title()}\n{table.rows(of_trainer)}")
        for label, result in of_trainer.items():
            if "profile" in result:
                print(f"{label}: {profiling.digest(result['profile']).lstrip()}")
        print("\n".join(table.verdicts(of_trainer)))
    print(machine({f"{t} {label}": r for t, rs in results.items() for label, r in rs.items()}))
    return 0 if all(map(table.good, results.values())) else 1


def jobs(found: Any) -> list[Job]:
    """TRL's side first, because ftcore's memory may be a part of its; ftcore's once for each memory setting."""
    return [
        (trainer, side, memory, shared, f"ftcore {memory}{' shared' * shared}" if side == "ftcore" else side)
        for trainer in found.trainers.split(",")
        for side in sorted(found.sides.split(","), reverse=True)
        for memory in (found.memory.split(",") if side == "ftcore" else [""])
        for shared in ((False, True) if found.shared and (trainer, side) == ("grpo", "ftcore") else (False,))
    ]


def within(memory: str, trl: dict[str, Any] | None) -> str:
    """`auto@0.6x` in GiB: TRL's weights, and that part of its memory above them; `auto` where TRL has none."""
    mode, _, limit = memory.partition("@")
    if not limit.endswith("x"):
        return memory
    if trl is None or trl["status"] != "ok" or not trl["above_gib"]:
        return mode
    return f"{mode}@{trl['base_gib'] + float(limit[:-1]) * trl['above_gib']:.3f}"


def located(work: TrainerWork, limit: float) -> dict[str, Any]:
    """The checkpoint folder, and what is adapted of it."""
    plain = {name: getattr(work, name) for name in Work.__dataclass_fields__}
    folder = str(Path(work.folder).resolve()) if work.folder else ""
    return processes.located(Work(**{**plain, "folder": folder}), limit)


def keep(found: Any, words: list[str], works: dict[str, TrainerWork], results: dict[str, table.Results]) -> None:
    """Write what is known so far into `$OUT`, so that a command cut off leaves its finished sides."""
    if not (out := os.environ.get("OUT")):
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "command": shlex.join(["python", "tests/bench/preference_step.py", *words]),
        "work": {trainer: asdict(work) for trainer, work in works.items()},
        "verdicts": {trainer: table.verdicts(of_trainer) for trainer, of_trainer in results.items() if of_trainer},
        "results": {
            trainer: {label: {k: v for k, v in r.items() if k != "profile"} for label, r in of_trainer.items()}
            for trainer, of_trainer in results.items()
        },
    }
    file = folder / f"preference-{found.shape}-{found.length}.json"
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for trainer, of_trainer in results.items():
        if profiles := [f"{label}: {r['profile']}\n" for label, r in of_trainer.items() if "profile" in r]:
            (folder / f"profile-{trainer}.txt").write_text("\n".join(profiles), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
