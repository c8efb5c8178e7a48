"""Times the writing of completions by transformers, by Unsloth and by ftcore, in a process each.

    python tests/bench/rollout_speed.py 1b --ahead --peers 'source .whl/enter.sh --peers'
    python tests/bench/rollout_speed.py 0.6b-mixed --sides hf,ftcore --batch 64 --parts 2
    python tests/bench/rollout_speed.py 8b-nf4 --sides ftcore --weights packed

Random weights of a real shape, an adapter of rank 16 with random B, greedy, no end token: every row writes as many
tokens as it is told, from a seed the same on all sides. One warm-up, then one pass by the clock; peaks are
`torch.cuda.max_memory_allocated`. A peer may complete a part of the rows; its rate is that part's.
Results also go to `$OUT/rollout-ROW.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rollbench import sides
from rollbench.works import ROWS, SIDES, TINY, RollWork
from stepbench import processes
from stepbench.table import machine


def main(words: list[str]) -> int:
    """Every side in its own process, and a table."""
    if words[:1] == ["--inner"]:
        if words[1] == "locate":
            processes.inner("locate")
        else:
            sides.inner(words[1])
        return 0
    found = arguments(words)
    script, names = Path(__file__).resolve(), found.sides.split(",")
    ready = {name: processes.Process(name, found.device, found.peers, script) for name in names if found.ahead}
    work = work_of(found)
    plain = {name: getattr(work, name) for name in processes.Work.__dataclass_fields__}
    made = processes.located(processes.Work(**plain), found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    work = replace(work, **made)
    for process in ready.values():
        process.ready()
    print(work.title(), flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        process = ready.get(name) or processes.Process(name, found.device, found.peers, script)
        results[name] = process.run(work.text(), found.limit)
        print(line(name, results[name], results.get("hf", {})), flush=True)
        keep(words, found.row or work.shape, work, results)
    print(machine(results))
    return 0 if all(result["status"] == "ok" for result in results.values()) else 1


def line(name: str, result: dict[str, Any], hf: dict[str, Any]) -> str:
    """A result in a line."""
    if result["status"] != "ok":
        return f"{name}: {result['status']}, {result['detail']}"
    rate = result["tokens_per_second"]
    times = f", {rate / hf['tokens_per_second']:.1f} times hf" if hf.get("status") == "ok" and name != "hf" else ""
    same = "" if "digest" not in hf or name == "hf" else f", first tokens {_same(result, hf)}"
    return (
        f"{name:8} {rate:9,.0f} tok/s{times}; {result['tokens']:,} tokens in {result['seconds']:.2f} s; "
        f"peak {result['peak_gib']:.2f} GiB, weights {result['weights_gib']:.2f}{same}"
    )


def _same(one: dict[str, Any], other: dict[str, Any]) -> str:
    pairs = list(zip(one["first_tokens"], other["first_tokens"], strict=True))
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} as hf's"


def keep(words: list[str], row: str, work: RollWork, results: dict[str, dict[str, Any]]) -> None:
    """Write what is known so far into `$OUT`."""
    if not (out := os.environ.get("OUT")):
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tests/bench/rollout_speed.py", *words])
    text = json.dumps({"command": command, "work": asdict(work), "results": results}, indent=1)
    (Path(out) / f"rollout-{row}.json").write_text(text + "\n", encoding="utf-8")


def arguments(words: list[str]) -> argparse.Namespace:
    """The row's options, then `--tiny`'s, and what was written on the command line over both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS, help="a row by name; none for the options below alone")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--peers", default="", metavar="SHELL", help="run before unsloth, to find it")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--shape", default="llama3.2-1b")
    parser.add_argument("--rows", type=int, default=16, help="completions")
    parser.add_argument("--group", type=int, default=0, help="completions of a prompt, of mixed lengths")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--batch", type=int, default=0, help="rows at once; 0: all")
    parser.add_argument("--parts", type=int, default=0, help="batches that a peer completes; 0: all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantizer", default="none")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--weights", choices=("", "unpacked", "packed"), default="", help="ftcore's 4-bit ones")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each side")
    parser.add_argument("--ahead", action="store_true", help="let all sides import their packages at once, in advance")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny model and few tokens")
    parser.add_argument("--folder", default="", help="checkpoint folder; none makes one of random weights")
    first = parser.parse_args(words)
    parser.set_defaults(**ROWS.get(first.row, {}))
    if first.tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args(words)


def work_of(found: argparse.Namespace) -> RollWork:
    """The job of every side."""
    shared = {name: getattr(found, name) for name in RollWork.__dataclass_fields__ if hasattr(found, name)}
    fixed = {"memory": "auto", "recompute": False, "optimizer": "adamw", "warmup": 1, "steps": 1}
    folder = str(Path(found.folder).resolve()) if found.folder else ""
    return RollWork(**{**shared, **fixed, "length": found.prompt + found.new, "folder": folder})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
