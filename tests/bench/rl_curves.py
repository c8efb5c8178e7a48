"""Trains SmolLM2-135M by rewards on a reasoning-gym puzzle with the command line, several seeds, and compares rewards.

    python tests/bench/rl_curves.py grpo
    python tests/bench/rl_curves.py ppo --task ransom_note
    python tests/bench/rl_curves.py grpo -- adapter.r=32 trainer.beta=0.01

The real weights; a process for each seed runs `ftcore +model=smollm2 +trainer=... data=reasoning_gym`, and what comes
after `--` is added to it. Every seed's last 20 steps must have 0.2 more mean reward than its first 20. Puzzles and
settings are in rlbench/learning.py. Rewards go to `$OUT/rl-TRAINER-TASK.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlbench.learning import TASKS, TRAINERS, Learning, ends, rewards, verdict
from stepbench.processes import environment, tail
from stepbench.sides import versions


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--task", choices=TASKS, default="syllogism")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=64, help="completions of a step")
    parser.add_argument("--new", type=int, default=12, help="tokens of the longest completion")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny random model")
    parser.add_argument("--parallel", type=int, default=3, help="runs at the same time; they wait for Python, mostly")
    parser.add_argument("--limit", type=float, default=540, help="seconds for each run")
    own = words[: words.index("--")] if "--" in words else words
    return parser.parse_args(own, argparse.Namespace(more=words[len(own) + 1 :]))


def main(words: list[str]) -> int:
    """All seeds, and the file of their rewards."""
    found = arguments(words)
    seeds = found.seeds.split(",")
    names = ("trainer", "task", "steps", "size", "new", "rate", "temperature", "tiny")
    shared = {name: getattr(found, name) for name in names} | {"more": tuple(found.more)}
    with tempfile.TemporaryDirectory() as scratch:
        runs = {seed: Learning(seed=int(seed), **shared) for seed in seeds}
        print(shlex.join(["ftcore", *next(iter(runs.values())).words(Path("RUN"))]), flush=True)
        with ThreadPoolExecutor(found.parallel) as pool:
            done = pool.map(lambda seed: one(runs[seed], Path(scratch) / seed, found), seeds)
            results = dict(zip(seeds, done, strict=True))
    kept = {
        "command": shlex.join(["python", "tests/bench/rl_curves.py", *words]),
        "ftcore": runs[seeds[0]].words(Path("RUN")),
        "versions": versions(),
        "runs": results,
    }
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"rl-{found.trainer}-{found.task}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    good = {seed: result for seed, result in results.items() if result["status"] == "ok"}
    gains = {seed: result["last"] - result["first"] for seed, result in good.items()}
    said = verdict(gains)
    print(said)
    return 0 if len(good) == len(seeds) and "NO" not in said else 1


def one(run: Learning, folder: Path, found: argparse.Namespace) -> dict[str, Any]:
    """A run's rewards, step by step; said as soon as it is over."""
    start = time.monotonic()
    command = [sys.executable, "-m", "ftcore", *run.words(folder)]
    # One thread each, unless the caller says otherwise: runs on a GPU share the CPU's cores.
    given = {"OMP_NUM_THREADS": "1", **environment(found.device)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=found.limit, env=given)
        failed = f"exit {done.returncode}\n{tail(done.stdout + done.stderr)}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"over its limit of {found.limit:.0f} s"
    by_step = rewards(folder)
    failed = failed or ("" if by_step else "its folder has no rewards")
    result: dict[str, Any] = {
        "status": "failed" if failed else "ok",
        "rewards": by_step,
        "seconds": time.monotonic() - start,
    }
    if failed:
        print(f"seed {run.seed}: failed after {max(by_step, default=0)} steps, {failed}", flush=True)
        return result
    result["first"], result["last"] = ends(by_step, run.steps)
    gain = f"{result['first']:.3f} to {result['last']:.3f}, {result['last'] - result['first']:+.3f}"
    print(f"seed {run.seed}: {gain}, {result['seconds']:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
