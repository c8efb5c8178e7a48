"""Runs that are killed (`kill -9`) at random moments, again and again, each time gone on with by the same command.

    python tests/reliability/kill_runs.py 200

A run of 8 steps saves after each, keeps two checkpoints, evaluates and exports: the kills fall on training, saving,
rotating, evaluating and exporting. Processes are forked from one that has everything imported. A run is lost when the
same command cannot go on; the count of those is the exit status.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    *("+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]", "+export=[safetensors]"),
    *("export.safetensors.verify=false", "trainer.max_steps=8", "trainer.save_steps=1", "trainer.eval_steps=4"),
    *("trainer.global_batch=2", "trainer.args.save_total_limit=2"),
)


def run(folder: Path, log: Path) -> None:
    """The command in this process; never returns."""
    import torch

    from ftcore.cli import run as command

    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(command([*WORDS, f"output_dir={folder}"]))


def started(folder: Path, log: Path) -> int:
    """Process number of a new run."""
    pid = os.fork()
    if pid == 0:
        run(folder, log)
    return pid


def main(count: int, seed: int = 0) -> int:
    """Kill `count` times; the number of runs that could not go on."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    import ftcore.pipeline  # noqa: F401
    from ftcore.run_state import read_run

    draw, lost, kills, runs, seconds = random.Random(seed), 0, 0, 0, 8.0
    with tempfile.TemporaryDirectory() as name:
        while kills < count:
            runs += 1
            folder, log, alive = Path(name) / f"run-{runs}", Path(name) / f"log-{runs}", True
            killed = 0
            while alive:
                begun = time.monotonic()
                pid = started(folder, log)
                wait = draw.random() * seconds if kills < count and killed < 10 else 300.0
                code = None
                while code is None and time.monotonic() - begun < wait:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    code = os.waitstatus_to_exitcode(status) if done else None
                    time.sleep(0.002)
                if code is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    kills, killed = kills + 1, killed + 1
                    if (read_run(folder) or {}).get("status") != "done":
                        continue
                    code = 0  # killed once all was done and said: there is nothing left to go on with
                alive = False
                if killed == 0:
                    seconds = 1.2 * (time.monotonic() - begun)  # what a whole run takes here
                lost += code != 0
                print(f"run {runs}: killed {killed} times, then exit {code}", flush=True)
                if code != 0:
                    print(log.read_text()[-2000:], flush=True)
    print(f"{kills} kills in {runs} runs: {lost} could not go on", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
