"""Trains SmolLM2-135M with LoRA by plain Hugging Face and by ftcore, several seeds each, and compares the losses.

    python tests/bench/loss_curves.py --dtype bfloat16
    python tests/bench/loss_curves.py --dtype float16
    python tests/bench/loss_curves.py --dtype bfloat16 --quantizer fp8
    python tests/bench/loss_curves.py --plot curves-bfloat16.json curves-float16.json --to docs/loss-curves.svg

The real weights, ftcore's shipped sample rows, rank 16 on all linear layers. A seed decides the order of the rows and
the adapter's start, the same on both sides, which the checksums of the adapters show. Every run has a process of its
own; plain Hugging Face's imports no ftcore. Losses go to `$OUT/curves-DTYPE.json`, or to
`$OUT/curves-DTYPE-QUANTIZER.json` where ftcore's base weights are quantized; plain Hugging Face's are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curvebench import compare, plot, rows
from curvebench.training import Run, trained
from stepbench.processes import environment, tail
from stepbench.sides import versions

SIDES = ("hf", "ftcore")


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quantizer", default="", help="of ftcore's base weights, such as fp8")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny random model")
    parser.add_argument("--parallel", type=int, default=6, help="runs at the same time; they wait for Python, mostly")
    parser.add_argument("--limit", type=float, default=400, help="seconds for each run")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="FILE.json", help="draw and compare, train nothing")
    parser.add_argument("--to", type=Path, default=Path("loss-curves.svg"))
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Train, or draw."""
    if words[:1] == ["--inner"]:
        inner(*words[1:])
        return 0
    found = arguments(words)
    if found.plot:
        kept = [json.loads(file.read_text(encoding="utf-8")) for file in found.plot]
        plot.draw(kept, found.to)
    else:
        kept = [train(found)]
    print("\n".join(compare.report(one) for one in kept))
    return 0


def train(found: argparse.Namespace) -> dict[str, Any]:
    """All runs, each in its own process, and the file of their losses."""
    seeds = [int(seed) for seed in found.seeds.split(",")]
    shared = {name: getattr(found, name) for name in ("dtype", "device", "steps", "size", "kernels", "quantizer")}
    runs = {f"{side}-{seed}": Run(side=side, seed=seed, **shared) for seed in seeds for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.json"
        process(["rows", "tiny" if found.tiny else "real", str(data), str(found.length)], found)
        with ThreadPoolExecutor(found.parallel) as pool:
            results = dict(zip(runs, pool.map(lambda run: one(run, data, found), runs.values()), strict=True))
        count = len(json.loads(data.read_text(encoding="utf-8"))["rows"])
    first = next(iter(results.values()))
    for name, result in results.items():
        print(f"{name}: {result['losses'][0]:.4f} to {result['losses'][-1]:.4f}, adapter {result['adapter_at_start']}")
    kept = {
        "dtype": found.dtype,
        "seeds": seeds,
        "rows": count,
        "run": asdict(next(iter(runs.values()))),
        "gpu": first["gpu"],
        "versions": first["versions"],
        "runs": results,
    }
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        name = "-".join(filter(None, ("curves", found.dtype, found.quantizer)))
        (Path(out) / f"{name}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return kept


def one(run: Run, data: Path, found: argparse.Namespace) -> dict[str, Any]:
    """A run's result."""
    to = data.with_name(f"{run.side}-{run.seed}.json")
    process(["run", json.dumps(asdict(run)), str(data), str(to)], found)
    result: dict[str, Any] = json.loads(to.read_text(encoding="utf-8"))
    return result


def process(words: list[str], found: argparse.Namespace) -> None:
    """The inner form of this script; the end of what it printed is shown when it fails."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--inner", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=found.limit,
        env={**environment(found.device), "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:2])} failed:\n{tail(done.stderr)}")


def inner(task: str, what: str, data: str, to: str) -> None:
    """`rows tiny|real FILE LENGTH` tokenizes the rows; `run JSON ROWS FILE` trains."""
    if task == "rows":
        Path(data).write_text(json.dumps(rows.prepared(what == "tiny", int(to))), encoding="utf-8")
    else:
        result = trained(Run(**json.loads(what)), json.loads(Path(data).read_text(encoding="utf-8")))
        Path(to).write_text(json.dumps({**result, "versions": versions()}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
