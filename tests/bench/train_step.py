"""Times a training step of plain Hugging Face, Liger, Unsloth, TRL and ftcore, in a process each.

    python tests/bench/train_step.py 8b-lora --peers 'source .whl/enter.sh --peers'
    python tests/bench/train_step.py --family llama --shape llama3.1-8b --rows 4 --length 2048 --memory least

Random weights of a real shape, real random token ids, all that the family declares for LoRA adapted, fused AdamW; the
median of the timed steps after warm-up; peak is `torch.cuda.max_memory_allocated` after warm-up. All sides start from
the same checkpoint folder and train as many parameters, and their first losses must agree within 0.5 %, or the last
lines say so and the exit code is 1.
Results also go to `$OUT/ROW.json`, those of `--profile` to `$OUT/profile-ROW.txt`. Rows are in stepbench/works.py.
Where a machine gives a command only minutes, `--known ROW.json` takes the sides that an earlier command measured there.
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

from stepbench import options, processes, profiling, table
from stepbench.sides import MEMORY, NEEDS
from stepbench.works import Work


def main(words: list[str]) -> int:
    """Run every side in its own process, and print the table."""
    if words[:1] == ["--inner"]:
        processes.inner(*words[1:])
        return 0
    found = options.arguments(words, __doc__)
    works = options.works(found)
    first = next(iter(works.values()))
    name = found.row or f"{first.shape}-{first.rows}x{first.length}-r{first.rank}-{first.quantizer}-{found.memory}"
    planned = jobs(found.sides.split(","), works)
    waiting = [processes.Process(side, first.device, found.peers) for side, *_ in planned] if found.ahead else []
    folder = str(Path(first.folder).resolve()) if first.folder else ""
    made = processes.located(replace(first, folder=folder), found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    works = {memory: replace(work, **made) for memory, work in works.items()}
    first = next(iter(works.values()))
    print(f"{name}: {first.title()}", flush=True)
    results = known(found.known, first) if found.known else {}
    for process in waiting:
        process.ready()
    for side, memory, label in planned:
        start = time.monotonic()
        process = waiting.pop(0) if waiting else processes.Process(side, first.device, found.peers)
        # The profile is of ftcore's bare loop alone.
        work = replace(works[memory], profile=found.profile and side == "ftcore")
        result = process.run(work.text(), found.limit)
        results[label] = {**result, "seconds": time.monotonic() - start}
        print(table.line(label, results[label]), flush=True)
        keep(name, words, works, results)
    print(table.table(results))
    print(table.machine(results))
    for label, result in results.items():
        if "profile" in result:
            print(f"{label}: {profiling.digest(result['profile']).lstrip()}")
    print("\n".join(table.verdicts(results)))
    failed = any(result["status"] == "failed" for result in results.values())
    return 0 if table.agree(results) and table.trained_alike(results) and not failed else 1


def jobs(sides: list[str], works: dict[str, Work]) -> list[tuple[str, str, str]]:
    """(side, memory, label): ftcore's sides once for each of its memory settings, the others once."""
    if strange := [side for side in sides if side not in NEEDS]:
        raise SystemExit(f"there is no side '{strange[0]}'; sides: {', '.join(NEEDS)}")
    first = next(iter(works))
    return [
        (side, memory, f"{side} {memory}" if side in MEMORY else side)
        for side in sides
        for memory in (works if side in MEMORY else [first])
    ]


SAME = (
    "family",
    "shape",
    "rows",
    "length",
    "rank",
    "quantizer",
    "recompute",
    "optimizer",
    "device",
    "warmup",
    "steps",
    "images",
)
"""What must be alike in work for its results to be compared."""


def known(file: str, work: Work) -> table.Results:
    """Results of an earlier command, of the same work."""
    kept = json.loads(Path(file).read_text(encoding="utf-8"))
    earlier = next(iter(kept["work"].values()))
    if other := [field for field in SAME if earlier.get(field, 0) != getattr(work, field)]:
        raise SystemExit(f"{file} is of other work: {other[0]} is {earlier[other[0]]}, not {getattr(work, other[0])}")
    results: table.Results = {label: {**result, "known": True} for label, result in kept["results"].items()}
    return results


def keep(name: str, words: list[str], works: dict[str, Work], results: table.Results) -> None:
    """Write what is known so far into `$OUT`, so that a command cut off leaves its finished sides."""
    if not (out := os.environ.get("OUT")):
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {
        "row": name,
        "command": shlex.join(["python", "tests/bench/train_step.py", *words]),
        "work": {memory: asdict(work) for memory, work in works.items()},
        "agree": table.agree(results),
        "verdicts": table.verdicts(results),
        "results": {k: {f: v for f, v in r.items() if f != "profile"} for k, r in results.items()},
    }
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    profiles = [f"{label}: {result['profile']}\n" for label, result in results.items() if "profile" in result]
    if profiles:
        (folder / f"profile-{name}.txt").write_text("\n".join(profiles), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
