"""How long a row may be, and how fast it goes: whole steps over one row of random tokens, Llama-3.1-8B in NF4.

    python tests/bench/long_context.py speed --peers 'source .whl/enter.sh --peers'
    python tests/bench/long_context.py caps --only-wanted --layers 8
    python tests/bench/long_context.py caps --gib 24 --tries 3
    python tests/bench/long_context.py whole --tokens 700000 --layers 2

LoRA r32 on all linear layers, fused AdamW, random weights. `speed`: tokens a second and peak of each side, after a step
of warm-up. `caps`: for each cap of GPU memory (`torch.cuda.set_per_process_memory_fraction`, set before the weights are
read) one whole step over twice the tokens that Unsloth publishes for a card of that size (`--only-wanted`), or a search
that begins at what `ftcore.forecast` says. `whole`: one step of that length on the whole card, beside what is planned.

A short step comes first, so that the optimizer has its moments. `--layers` runs that many layers; what the weights,
adapters, gradients and moments of the others take is allocated beside them. Rows whose step is forecast to take longer
than `--limit` seconds are left out, and said. Results also go to `$OUT/long-context-MODE.json`, those of `--profile` to
`$OUT/profile-MODE.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from contextbench import search, sides, table
from contextbench.works import TINY, UNSLOTH, ContextWork, wanted
from stepbench import processes, profiling
from stepbench.options import MEMORIES
from stepbench.table import machine

LOADING = 150
"""Seconds that a side may take besides its steps."""
SHORT = 256
"""Tokens of the step that comes first."""


def main(words: list[str]) -> int:
    """One of the three."""
    if words[:1] == ["--inner"]:
        sides.inner(words[1])
        return 0
    found = arguments(words)
    return Bench(found, words).run()


class Bench:
    """A command: its plan, its processes and its results."""

    def __init__(self, found: argparse.Namespace, words: list[str]) -> None:
        self.found, self.words = found, words
        self.names = found.sides.split(",")
        self.work = work_of(found)
        self.rows: list[table.Result] = []
        self.plan: dict[str, Any] = {}
        self.ahead: dict[str, deque[processes.Process]] = {}

    def run(self) -> int:
        """Plan, measure and judge."""
        gibs = self.gibs
        if self.found.ahead:
            self.ahead = {side: deque(self.process(side) for _ in gibs) for side in self.names}
        lengths = [wanted("ftcore", gib, self.found.scale) if gib else self.found.tokens for gib in gibs]
        sizes = {"card": self.found.card, "host": self.found.host if self.found.mode == "whole" else 0}
        asked = {"work": asdict(self.work), "gibs": gibs, "lengths": lengths, **sizes}
        self.plan = self.process("plan").run(json.dumps(asked), LOADING)
        if self.plan["status"] != "ok":
            print(f"no checkpoint folder: {self.plan['detail']}")
            return 1
        made = dict(self.plan["made"])
        self.settings = made.pop("settings")
        self.work = replace(self.work, **made)
        print(f"{self.found.mode}: {self.work.title()}", flush=True)
        for gib in gibs:
            for side in self.names:
                self.of_cap(side, gib)
        return self.judged()

    @property
    def gibs(self) -> list[float]:
        """The caps; 0 is none."""
        return [float(gib) for gib in self.found.gib.split(",")] if self.found.mode == "caps" else [0.0]

    @property
    def depth(self) -> int:
        """Layers that are run."""
        return min(self.work.depth or self.work.layers, self.work.layers)

    def of_cap(self, side: str, gib: float) -> None:
        """The trials of a side under a cap."""
        if self.found.mode != "caps":
            self.trial(side, gib, self.found.tokens)
            return
        goal = wanted(side, gib, self.found.scale)
        forecast = self.plan["longest"][f"{gib:g}"] if side == "ftcore" else goal
        print(f"{gib:g} GiB, {side}: {goal:,} tokens wanted, {forecast:,} forecast", flush=True)
        if self.found.only_wanted:
            if goal:
                self.trial(side, gib, goal)
            return
        best = search.longest(forecast or goal, lambda tokens: self.trial(side, gib, tokens), self.found.tries)
        print(f"{gib:g} GiB, {side}: the longest that fitted has {best:,} tokens", flush=True)

    def trial(self, side: str, gib: float, tokens: int) -> bool | None:
        """One process, its steps, and whether they fitted; None where that is not known."""
        steps = self.found.steps + (self.found.warmup if not self.work.short else 0)
        row: table.Result = {
            "side": side,
            "gib": gib,
            "tokens": tokens,
            "depth": self.depth,
            "wanted": wanted(side, gib, self.found.scale),
            "seconds": self.near(gib, tokens)["seconds"],
        }
        self.rows.append(row)
        if missing := self.impossible(side, gib, tokens, steps * row["seconds"]):
            row["outcome"] = "left out"
            print(f"{side}, {tokens:,} tokens: left out, {missing}", flush=True)
            self.keep()
            return None
        print(f"{side}, {tokens:,} tokens: {row['seconds']:.1f} s a step are forecast", flush=True)
        profile = self.found.profile and side == "ftcore"
        work = replace(self.work, length=tokens, gib=gib, short=min(self.work.short, tokens), profile=profile)
        waiting = self.ahead.get(side)
        process = waiting.popleft() if waiting else self.process(side)
        result = row["result"] = process.run(json.dumps({"work": asdict(work)}), self.found.limit + LOADING)
        if kernels := result.pop("profile", ""):
            print(profiling.digest(kernels).lstrip(), flush=True)
            self.keep_profile(kernels)
        row["outcome"] = self.outcome(row)
        detail = f", {result['detail']}" if "detail" in result else ""
        print(f"{side}, {tokens:,} tokens: {row['outcome']}{detail}", flush=True)
        self.keep()
        return {"ok": True, "memory": False}.get(result["status"]) if row["outcome"] != "unsound" else None

    def impossible(self, side: str, gib: float, tokens: int, time: float) -> str:
        """Why a row is not run."""
        if time > self.found.limit:
            return f"its {time:.0f} s would be over the limit of {self.found.limit:.0f} s"
        if side != "ftcore" or self.work.memory != "offload":
            return ""
        host, there = self.near(gib, tokens)["host"], self.plan["available"]
        return f"{host / 2**30:.1f} GiB of host memory of {there / 2**30:.1f}" if host > there else ""

    def near(self, gib: float, tokens: int) -> dict[str, float]:
        """The forecast for the layers that are run, from that for the whole model at the length nearest to this one."""
        known = self.plan["known"][f"{gib:g}"]
        length = min(known, key=lambda length: abs(int(length) - tokens))
        figures, part, longer = known[length], self.depth / self.work.layers, tokens / int(length)
        # Attention takes most of a long row's time.
        return {"host": figures["host"] * part * longer, "seconds": figures["seconds"] * part * longer**2}

    def outcome(self, row: table.Result) -> str:
        """What a trial showed, in a word."""
        result = row["result"]
        if result["status"] != "ok":
            return {"memory": "out of memory", "missing": "not installed"}.get(result["status"], "failed")
        if wrong := table.sound(result, self.settings["vocab_size"]):
            print(f"UNSOUND: {wrong}", flush=True)
            return "unsound"
        if row["gib"] and result["reserved_gib"] > row["gib"]:
            return "over the cap"
        return "fits" if row["tokens"] < row["wanted"] else "reached" if row["wanted"] else "done"

    def judged(self) -> int:
        """The table, what it says, and the exit code."""
        print(f"\n{table.table(self.rows)}")
        good = {row["side"]: row["result"] for row in self.rows if row.get("result", {}).get("status") == "ok"}
        # In a search a row that does not fit is an answer too.
        right = ("reached", "done", "fits", *(["out of memory"] if self.found.mode == "caps" else []))
        well = all(row["outcome"] in right for row in self.rows)
        if self.found.mode == "caps":
            for gib in self.gibs:
                well &= self.reached(gib)
        elif self.found.mode == "speed":
            print("\n".join(table.speeds(good, self.found.tokens)))
        else:
            print(self.planned())
        print(machine(good))
        return int(not (well and good))

    def reached(self, gib: float) -> bool:
        """Whether ftcore's longest row under a cap is as long as wanted; said."""
        fits = [row for row in self.rows if row["gib"] == gib and row["outcome"] in ("reached", "fits")]
        best = max((row["tokens"] for row in fits if row["side"] == "ftcore"), default=0)
        goal = wanted("ftcore", gib, self.found.scale)
        cut = "" if self.depth == self.work.layers else f", {self.depth} of {self.work.layers} layers run"
        print(f"{gib:g} GiB: {goal:,} wanted, {best:,} shown{cut}: {'reached' if 0 < goal <= best else 'MISSED'}")
        return "ftcore" not in self.names or 0 < goal <= best

    def planned(self) -> str:
        """What is forecast of the whole model at that length."""
        whole, card = self.plan["known"]["0"][str(self.found.tokens)], self.plan["card"]
        peak, host = (whole[name] / 2**30 for name in ("peak", "host"))
        return (
            f"forecast for all {self.work.layers} layers: {peak:.1f} GiB of {card:.1f} on the GPU "
            f"({'fits' if peak <= card else 'TOO MUCH'}), {host:.1f} of {self.found.host:g} on the host "
            f"({'fits' if host <= self.found.host else 'TOO MUCH'}), {whole['seconds']:.0f} s a step; "
            f"the longest row has {self.plan['longest']['0']:,} tokens"
        )

    def process(self, side: str) -> processes.Process:
        """The inner form of this script."""
        return processes.Process(side, self.found.device, self.found.peers, Path(__file__).resolve())

    def keep(self) -> None:
        """Write what is known so far into `$OUT`."""
        if not (out := os.environ.get("OUT")):
            return
        Path(out).mkdir(parents=True, exist_ok=True)
        kept = {
            "command": shlex.join(["python", "tests/bench/long_context.py", *self.words]),
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
            "work": asdict(self.work),
            "plan": {name: value for name, value in self.plan.items() if name not in ("status", "made")},
            "rows": self.rows,
        }
        file = Path(out) / f"long-context-{self.found.mode}.json"
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def keep_profile(self, kernels: str) -> None:
        """Write the kernels of the latest row into `$OUT`."""
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / f"profile-{self.found.mode}.txt").write_text(kernels + "\n", encoding="utf-8")


def arguments(words: list[str]) -> argparse.Namespace:
    """The mode's options, then `--tiny`'s, and what was written on the command line over both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("speed", "caps", "whole"))
    parser.add_argument("--tokens", type=int, default=65536, help="of the row, for speed and whole")
    parser.add_argument("--gib", default=",".join(str(gib) for gib in UNSLOTH if gib < 80), help="caps")
    parser.add_argument("--only-wanted", action="store_true", help="one step at the wanted length, no search")
    parser.add_argument("--tries", type=int, default=2, help="further trials of a search, each 3 %% longer or shorter")
    parser.add_argument("--layers", type=int, default=0, help="that are run; 0: all")
    parser.add_argument("--host", type=float, default=110, help="GiB of host memory that whole plans with")
    parser.add_argument("--card", type=float, default=0, help="GiB of the GPU that whole plans with; 0: this one's")
    parser.add_argument("--sides", default="ftcore", help=f"with commas: {', '.join(sides.SIDES)}")
    parser.add_argument("--peers", default="", metavar="SHELL", help="run before unsloth, to find it")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--quantizer", default="bnb_nf4")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--memory", choices=MEMORIES, default="offload", help="ftcore's")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--limit", type=float, default=240, help="seconds for the steps of each row")
    parser.add_argument("--profile", action="store_true", help="one more step of ftcore under torch.profiler")
    parser.add_argument("--ahead", action="store_true", help="let all sides import their packages at once, in advance")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny model and short rows")
    parser.add_argument("--scale", type=int, default=1, help="divides the wanted lengths")
    parser.add_argument("--folder", default="", help="checkpoint folder; none makes one of random weights")
    first = parser.parse_args(words)
    if first.mode == "speed":
        parser.set_defaults(sides="unsloth,ftcore", steps=3)
    if first.tiny:
        parser.set_defaults(**TINY)
    if first.device == "cpu":
        parser.set_defaults(memory="least")  # there is no GPU that inputs could leave
    found = parser.parse_args(words)
    if strange := [side for side in found.sides.split(",") if side not in sides.SIDES]:
        parser.error(f"there is no side '{strange[0]}'; sides: {', '.join(sides.SIDES)}")
    return found


def work_of(found: argparse.Namespace) -> ContextWork:
    """The step of every row, but for its length."""
    shared = {name: getattr(found, name) for name in ContextWork.__dataclass_fields__ if hasattr(found, name)}
    shared.pop("layers")  # here those of the whole model
    folder = str(Path(found.folder).resolve()) if found.folder else ""
    fixed = {"rows": 1, "length": found.tokens, "recompute": True, "optimizer": "adamw", "folder": folder}
    return ContextWork(**{**shared, **fixed, "depth": found.layers, "short": 0 if found.mode == "speed" else SHORT})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
