"""Runs that are killed (`kill -9`) at random moments, again and again, each time gone on with by the same command.

    python tests/reliability/kill_runs.py 200 [SEED]

A run of 8 steps saves after each, keeps two checkpoints, evaluates and exports: the kills fall on training, saving,
rotating, evaluating and exporting. Processes are forked from one that has everything imported. A run is lost when the
same command cannot go on, and wrong when it ends with other weights than the unbroken run; the count of both is the
exit status.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ftcore.run_state import read_run
from ftcore.testing.faults import Child, last_step

STEPS = 8
WORDS = [
    *("+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]", "+export=[safetensors]"),
    *("export.safetensors.verify=false", f"trainer.max_steps={STEPS}", "trainer.save_steps=1", "trainer.eval_steps=4"),
    *("trainer.global_batch=2", "trainer.args.save_total_limit=2", "data.eval_size=4"),
]


def moment(folder: Path) -> str:
    """What a run that was killed was about, by what it left."""
    if not (folder / "run.json").is_file():
        return "before it began"
    if any((folder / "checkpoints").glob(".tmp-*")):
        return "while it saved"
    if (folder / "trained").is_dir() or last_step(folder) == STEPS:
        return "while it evaluated or exported"
    return "while it trained" if last_step(folder) else "before its first step"


def result_of(folder: Path) -> str:
    """A hash of the trained adapter and of the merged model."""
    total = hashlib.sha256()
    for name in ("trained/adapter_model.safetensors", "export/safetensors/model.safetensors"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()


def main(count: int, seed: int = 0) -> int:
    """Kill `count` times; the number of runs that could not go on, or ended as another."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl.trainer.sft_trainer  # noqa: F401

    import ftcore.pipeline  # noqa: F401

    torch.set_num_threads(1)
    draw, kills, runs, bad = random.Random(seed), 0, 0, Counter[str]()
    moments = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        begun = time.monotonic()
        unbroken = Child(WORDS, Path(name) / "unbroken", warm=True)
        if unbroken.wait() != 0:
            print(unbroken.said())
            return 1
        seconds, wanted = 1.2 * (time.monotonic() - begun), result_of(unbroken.folder)
        print(f"an unbroken run takes {seconds / 1.2:.1f} s", flush=True)
        while kills < count:
            runs += 1
            begun = time.monotonic()
            folder, killed, code = Path(name) / f"run-{runs}", 0, None
            while code is None:
                child = Child(WORDS, folder, warm=True)
                if kills >= count or killed >= 4:
                    code = child.wait()
                elif (code := child.kill_within(seconds, draw)) is None:
                    kills, killed = kills + 1, killed + 1
                    moments[moment(folder)] += 1
                    if (read_run(folder) or {}).get("status") == "done":
                        code = 0  # killed once all was done and said: there is nothing left to go on with
            if killed == 0:  # the machine has become quicker
                seconds = 1.2 * (time.monotonic() - begun)
            bad["lost"] += code != 0
            bad["wrong"] += code == 0 and result_of(folder) != wanted
            print(f"run {runs}: killed {killed} times, then exit {code}", flush=True)
            if code != 0:
                print(child.said()[-2000:], flush=True)
    print(", ".join(f"{number} {when}" for when, number in moments.most_common()))
    print(f"{kills} kills in {runs} runs: {bad['lost']} could not go on, {bad['wrong']} ended with other weights")
    return bad["lost"] + bad["wrong"]


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])) if len(sys.argv) > 1 else main(40))
