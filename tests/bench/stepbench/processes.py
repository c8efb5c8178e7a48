"""A side in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stepbench.sides import PEERS
from stepbench.works import Work

SCRIPT = Path(__file__).resolve().parent.parent / "train_step.py"
MARK = "RESULT "
LINES = 15
"""Lines of a failed side's errors that are shown."""


def measured(side: str, work: Work, peers: str, limit: float) -> dict[str, Any]:
    """What the side reports, or `status` and `detail` of how it failed."""
    return call([side, work.text()], work, peers if side in PEERS else "", limit)


def located(work: Work, limit: float) -> dict[str, Any]:
    """The checkpoint folder, made once, by ftcore."""
    return call(["locate", work.text()], work, "", limit)


def call(words: list[str], work: Work, before: str, limit: float) -> dict[str, Any]:
    """Run this script's inner form, after a shell command where there is one."""
    command = shlex.join([sys.executable, str(SCRIPT), "--inner", *words])
    shell = f"{before}; exec {command}" if before else f"exec {command}"
    process = subprocess.Popen(
        ["bash", "-c", shell],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(work.device),
        start_new_session=True,  # so that a side over its limit ends with the compilers that it started
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        return {"status": "failed", "detail": f"over its limit of {limit:.0f} s\n{tail(errors)}"}
    found = [line for line in output.splitlines() if line.startswith(MARK)]
    if process.returncode or not found:
        return {"status": "failed", "detail": f"exit {process.returncode}\n{tail(errors)}"}
    result: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    return result


def environment(device: str) -> dict[str, str]:
    """Offline; on a CPU no GPU is seen, and Triton's interpreter stays off."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
        found.pop("TRITON_INTERPRET", None)
    return found


def tail(text: str) -> str:
    """The last lines."""
    return "\n".join(text.strip().splitlines()[-LINES:])


def inner(side: str, text: str) -> None:
    """The inner form: one side, or the checkpoint folder, and its result as a line."""
    work = Work(**json.loads(text))
    if side == "locate":
        from stepbench.folder import locate

        result = {"status": "ok", "folder": locate(work)}
    else:
        from stepbench import sides

        result = sides.run(side, work)
    print(MARK + json.dumps(result), flush=True)
