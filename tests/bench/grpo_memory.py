"""GRPO of SmolLM2-135M by two generators: whether memory grows, and whether the rewards grow alike.

    python tests/bench/grpo_memory.py
    python tests/bench/grpo_memory.py --steps 100 --seeds 0,1
    python tests/bench/grpo_memory.py --plot grpo-memory.json --to docs/reward-curves.svg

The real weights learn reasoning-gym's syllogisms as in rl_curves.py, 200 steps of 64 completions, with `generator=fast`
and with `generator=transformers`, all runs at the same time in a process each. After step 20, and after the last shape
of batch whose launches were recorded, neither allocated nor reserved memory of the GPU may grow by more than 1 %, nor
the number of times that the allocator had to give everything back; or the exit code is 1. The mean rewards of the last
40 steps are compared with how far windows of ten of those steps, and seeds, are apart. Goes to `$OUT/grpo-memory.json`,
the curves to `$OUT/reward-curves.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlbench import alike, growth, plot
from rlbench.learning import Learning, rewards
from stepbench.processes import environment, tail
from stepbench.sides import versions

GENERATORS = ("transformers", "fast")
WINDOW = 40
"""Steps of the windows whose mean rewards are printed."""
TINY = {"steps": 4, "size": 8, "new": 4, "after": 1}
Result = dict[str, Any]


def main(words: list[str]) -> int:
    """Train and judge, or draw."""
    if words[:1] == ["--inner"]:
        inner(words[1:])
        return 0
    found = arguments(words)
    if found.plot:
        kept = json.loads(found.plot.read_text(encoding="utf-8"))
        plot.draw(curves_of(kept["runs"]), found.to)
        print("\n".join(compared(kept["runs"])))
        return 0
    runs = {(name, int(seed)): learning(found, name, int(seed)) for seed in found.seeds.split(",") for name in found.of}
    print(shlex.join(["ftcore", *next(iter(runs.values())).words(Path("RUN"))]), flush=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(runs)) as pool:
        done = pool.map(lambda key: one(runs[key], Path(scratch) / "-".join(map(str, key)), found), runs)
        results = [{"generator": name, "seed": seed, **result} for (name, seed), result in zip(runs, done, strict=True)]
    print("\n".join(compared(results)))
    keep(words, results)
    said, good = verdict(results, found.after)
    print(said)
    return int(not good or any(run["status"] != "ok" for run in results))


def verdict(runs: list[Result], after: int) -> tuple[str, bool]:
    """Whether memory grows, and whether that is well; a CPU's is not judged."""
    if any(run["grown"] for run in runs):
        return f"verdict: MEMORY GROWS after step {after}", False
    if all("allocated" in run["sizes"] for run in runs):
        return f"verdict: no growth of memory after step {after}", True
    gpu = any("allocated" in one for run in runs for one in run["memory"])
    return f"verdict: {'TOO FEW STEPS' if gpu else 'none, memory is measured on a GPU only'}", not gpu


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", default=",".join(GENERATORS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--task", default="syllogism")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="completions of a step")
    parser.add_argument("--new", type=int, default=12, help="tokens of the longest completion")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--after", type=int, default=growth.AFTER, help="steps after which memory may not grow")
    parser.add_argument("--limit", type=float, default=300, help="seconds, after which what is known is judged")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny random model and few steps")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw and compare, train nothing")
    parser.add_argument("--to", type=Path, default=Path("reward-curves.svg"))
    if parser.parse_args(words).tiny:
        parser.set_defaults(**TINY)
    found = parser.parse_args(words)
    found.of = found.generators.split(",")
    return found


def learning(found: argparse.Namespace, generator: str, seed: int) -> Learning:
    """A run."""
    names = ("task", "steps", "size", "new", "rate", "temperature", "tiny")
    shared = {name: getattr(found, name) for name in names}
    return Learning(trainer="grpo", seed=seed, more=(f"generator={generator}",), **shared)


def inner(words: list[str]) -> None:
    """The inner form: ftcore's run, with a callback that notes the memory."""
    import ftcore

    @ftcore.hookimpl
    def ftcore_callbacks(plan: Any) -> list[Any]:
        return [growth.StepMemory(plan.output_dir / "memory.jsonl")]

    ftcore.run(words, plugins=[ftcore_callbacks])


def one(run: Learning, folder: Path, found: argparse.Namespace) -> Result:
    """A run in its process: rewards and memory by step; said as soon as it is over."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--inner", *run.words(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # One thread each, unless the caller says otherwise: runs on a GPU share the CPU's cores.
        env={"OMP_NUM_THREADS": "1", **environment(found.device)},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=found.limit)
        failed = f"exit {process.returncode}\n{tail(output)}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        failed = f"over its limit of {found.limit:.0f} s"
    by_step, memory = rewards(folder), growth.read(folder / "memory.jsonl")
    sizes = growth.growth(memory, found.after)
    result: Result = {
        "status": "failed" if failed or not by_step else "ok",
        "seconds": time.monotonic() - start,
        "rewards": by_step,
        "memory": memory,
        "sizes": sizes,
        "grown": growth.grown(sizes),
    }
    name = f"{run.more[0]}, seed {run.seed}"
    print(f"{name}: {len(memory)} steps, {result['seconds']:.0f} s{', ' if failed else ''}{failed}", flush=True)
    word = f": {' and '.join(result['grown'])} GROWS" if result["grown"] else ""
    first = max(found.after, growth.settled(memory))
    print(f"  memory after step {first}: {growth.said(sizes)}{word}", flush=True)
    if by_step:
        means = " ".join(f"{mean:.3f}" for mean in alike.windows(list(by_step.values()), WINDOW))
        print(f"  mean reward of every {WINDOW} steps: {means}", flush=True)
    return result


def curves_of(runs: list[Result]) -> dict[str, list[list[float]]]:
    """Generator to its curves in the order of the seeds; all as long as the shortest."""
    curves: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["rewards"]:
            curves.setdefault(run["generator"], []).append(list(run["rewards"].values()))
    shortest = min((len(curve) for of in curves.values() for curve in of), default=0)
    return {generator: [curve[:shortest] for curve in of] for generator, of in curves.items()}


def compared(runs: list[Result]) -> list[str]:
    """The generators' rewards against each other."""
    curves = curves_of(runs)
    if len(curves) != 2:
        return ["rewards: nothing to compare"]
    steps = min(alike.LAST, len(next(iter(curves.values()))[0]))
    means = ", ".join(
        f"{name} {statistics.mean(statistics.mean(curve[-steps:]) for curve in of):.3f}" for name, of in curves.items()
    )
    apart, chance = alike.difference(*curves.values())
    word = "equal in kind" if apart <= chance else "FURTHER APART than that"
    return [
        f"mean reward of the last {steps} steps: {means}; {apart:.3f} apart; windows of {alike.WINDOW} of those steps, "
        f"and seeds, up to {chance:.3f}: {word}"
    ]


def keep(words: list[str], runs: list[Result]) -> None:
    """Results and figure into `$OUT`."""
    if not (out := os.environ.get("OUT")):
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tests/bench/grpo_memory.py", *words])
    kept = {"command": command, "versions": versions(), "compared": compared(runs), "runs": runs}
    (folder / "grpo-memory.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    try:
        plot.draw(curves_of(runs), folder / "reward-curves.svg")
    except ImportError as missing:
        print(f"no figure: {missing}; --plot {folder / 'grpo-memory.json'} draws it elsewhere")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
