"""Measures whole GRPO steps, generation included, each side in a process of its own: Qwen2.5-1.5B's shape on NF4.

    python tests/bench/grpo_whole.py
    python tests/bench/grpo_whole.py --memory auto@4.5 --rows 16
    python tests/bench/grpo_whole.py --sides trl,trl-continuous,ftcore --family llama --shape llama3.2-1b \\
        --quantizer none --prompts 8 --rows 64 --new 256 --memory auto --steps 2 --budget 45 --ahead

Random weights, 8 completions of a prompt of 128 tokens, LoRA r16 on all linear layers. TRL is as it comes, by
transformers' `generate` or by its continuous batching. The end token is put outside the
vocabulary, so that every completion has its 384 new tokens. Peaks are `torch.cuda.max_memory_allocated` from the first
step on, of generation and of training; the larger one may be 5e9 bytes at most, and beside TRL, above the weights, 0.6
of the faster one's, five times as fast. Seconds are medians after warm-up. A side ends with the first timed step after
`--budget` seconds of steps.
Results also go to `$OUT/grpo-whole-SHAPE.json`.
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

from rlbench.works import TrainerWork
from stepbench import processes
from stepbench.table import machine

TARGET = 5e9
"""Bytes, where TRL is not run."""
SPEED, MEMORY = 5.0, 0.6
"""Times the speed, and the memory above the weights, of the faster of TRL's ways."""
TINY = {"shape": "tiny", "rows": 4, "prompt": 96, "new": 16, "warmup": 1, "steps": 2}


def main(words: list[str]) -> int:
    """The peers, and each of ftcore's memory settings, once."""
    if words[:1] == ["--inner"]:
        from rlbench import whole

        whole.inner(words[1])
        return 0
    found = arguments(words)
    work, script = work_of(found), Path(__file__).resolve()
    jobs = [
        (side, m) for side in found.sides.split(",") for m in (found.memory.split(",") if side == "ftcore" else [""])
    ]
    waiting = [processes.Process(side, work.device, script=script) for side, _ in jobs] if found.ahead else []
    made = processes.Process("locate", work.device, script=script).run(work.text(), found.limit)
    if made.pop("status") != "ok":
        print(f"no checkpoint folder: {made['detail']}")
        return 1
    work = replace(work, **made)
    what = f"{work.prompts} x {work.group} completions of {found.new} tokens of prompts of {work.prompt}"
    print(f"{work.shape}, {work.quantizer}, LoRA r{work.rank}, {what}", flush=True)
    for process in waiting:
        process.ready()
    results: dict[str, dict[str, Any]] = {}
    for side, memory in jobs:
        label = f"ftcore memory={memory}" if memory else side
        process = waiting.pop(0) if waiting else processes.Process(side, work.device, script=script)
        results[label] = process.run(replace(work, memory=memory).text(), found.limit)
        print(line(label, results[label], alone=found.sides == "ftcore"), flush=True)
        keep(words, work, results)
    for said in verdicts(results):
        print(said)
    print(machine(results))
    return 0 if all(r["status"] == "ok" for r in results.values()) else 1


def line(label: str, result: dict[str, Any], alone: bool) -> str:
    """A result in a line; held to the target where only ftcore is run."""
    if result["status"] != "ok":
        return f"{label}: failed, {result['detail']}"
    parts = ", ".join(f"{p} {result[f'{p}_s']:.2f} s, {result[f'{p}_bytes']:,} B" for p in ("generation", "training"))
    word = "within" if result["peak_bytes"] <= TARGET else "OVER"
    peak = f"{result['peak_bytes']:,} B" + (f" ({word} {TARGET:,.0f})" if alone else "")
    return (
        f"{label}, {result['dtype']}: {step_seconds(result):.2f} s a step, {parts}; weights "
        f"{result['weights_bytes']:,} B; peak {peak if result['peak_bytes'] else 'not measured'}"
    )


def verdicts(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each of ftcore's settings against the faster of TRL's ways, as far as both ran."""
    good = {label: result for label, result in results.items() if result["status"] == "ok"}
    peers = [label for label in good if not label.startswith("ftcore")]
    if not peers:
        return []
    peer = min(peers, key=lambda label: step_seconds(good[label]))
    lines = []
    for label in (label for label in good if label not in peers):
        speed = step_seconds(good[peer]) / step_seconds(good[label])
        words = [f"{speed:.2f} times the speed of {peer} ({'reaches' if speed >= SPEED else 'UNDER'} {SPEED:g})"]
        theirs, ours = (good[side]["peak_bytes"] - good[side]["weights_bytes"] for side in (peer, label))
        if good[peer]["peak_bytes"]:  # a CPU's memory is not measured
            word = "within" if ours <= MEMORY * theirs else "OVER"
            words.append(f"memory above the weights {ours / theirs:.2f} of its ({word} {MEMORY:g})")
        lines.append(f"{label}: {', '.join(words)}")
    return lines


def step_seconds(result: dict[str, Any]) -> float:
    """Of a whole step."""
    return float(result["generation_s"] + result["training_s"])


def keep(words: list[str], work: TrainerWork, results: dict[str, dict[str, Any]]) -> None:
    """Write what is known so far into `$OUT`."""
    if not (out := os.environ.get("OUT")):
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tests/bench/grpo_whole.py", *words])
    kept = {"command": command, "work": asdict(work), "target_bytes": TARGET, "results": results}
    (Path(out) / f"grpo-whole-{work.shape}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2")
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--quantizer", default="bnb_nf4")
    parser.add_argument("--sides", default="ftcore", help="ftcore, trl, trl-continuous, with commas")
    parser.add_argument("--memory", default="least,auto@4.5", help="ftcore's, several with commas; auto@4.5: in GiB")
    parser.add_argument("--generator", default="fast", help="ftcore's")
    parser.add_argument("--prompts", type=int, default=1, help="of a step")
    parser.add_argument("--rows", type=int, default=8, help="completions of a step, of all its prompts")
    parser.add_argument("--prompt", type=int, default=128, help="its tokens, the template's included")
    parser.add_argument("--new", type=int, default=384, help="tokens of every completion")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit", type=float, default=280, help="seconds for each setting")
    parser.add_argument("--budget", type=float, default=0, help="seconds of each setting's steps; 0: all are made")
    parser.add_argument("--ahead", action="store_true", help="let all sides import their packages at once, in advance")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny model and few tokens")
    parser.add_argument("--folder", default="", help="checkpoint folder; none makes one of random weights")
    if parser.parse_args(words).tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args(words)


def work_of(found: argparse.Namespace) -> TrainerWork:
    """The step."""
    shared = {name: getattr(found, name) for name in TrainerWork.__dataclass_fields__ if hasattr(found, name)}
    folder = str(Path(found.folder).resolve()) if found.folder else ""
    fixed = {"trainer": "grpo", "recompute": True, "optimizer": "adamw", "length": found.prompt + found.new}
    return TrainerWork(**{**shared, **fixed, "folder": folder, "memory": ""})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
