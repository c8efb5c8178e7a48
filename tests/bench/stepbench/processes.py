"""A side in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepbench.sides import PEERS
from stepbench.works import Work

SCRIPT = Path(__file__).resolve().parent.parent / "train_step.py"
MARK = "RESULT "
READY = "READY"
LINES = 15
"""Lines of a failed side's errors that are shown."""


def located(work: Work, limit: float) -> dict[str, Any]:
    """The checkpoint folder, made once, by ftcore, and what ftcore adapts of it."""
    return Process("locate", work.device).run(work.text(), limit)


class Process:
    """A script's inner form: it imports its packages, and waits for its work."""

    def __init__(self, side: str, device: str, peers: str = "", script: Path = SCRIPT) -> None:
        command = shlex.join([sys.executable, str(script), "--inner", side])
        before = peers if side in PEERS else ""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  open as long as the process is
        self._process = subprocess.Popen(
            ["bash", "-c", f"{before}; exec {command}" if before else f"exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=environment(device),
            start_new_session=True,  # so that a side over its limit ends with the compilers that it started
        )

    def ready(self) -> None:
        """Wait until everything is imported, or failed to be."""
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line.strip() != READY:
            pass

    def run(self, work: str, limit: float) -> dict[str, Any]:
        """What the side reports of its work, or `status` and `detail` of how it failed."""
        try:
            output, _ = self._process.communicate(work + "\n", timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            return {"status": "failed", "detail": f"over its limit of {limit:.0f} s\n{self._last()}"}
        found = [line for line in output.splitlines() if line.startswith(MARK)]
        if self._process.returncode or not found:
            return {"status": "failed", "detail": f"exit {self._process.returncode}\n{self._last()}"}
        result: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
        return result

    def _last(self) -> str:
        self._errors.seek(0)
        return tail(self._errors.read())


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


def inner(side: str) -> None:
    """The inner form: one side, or the checkpoint folder, and its result as a line."""
    from stepbench import sides

    def run(text: str) -> dict[str, Any]:
        work = Work(**json.loads(text))
        if side != "locate":
            return sides.run(side, work)
        from stepbench.folder import locate

        return {"status": "ok", **locate(work)}

    answer(lambda: None if side == "locate" else sides.imports(side), run)


def answer(imports: Callable[[], None], run: Callable[[str], dict[str, Any]]) -> None:
    """What an inner form does: import, say so, wait for the work, and print what was measured."""
    imports()
    print(READY, flush=True)
    print(MARK + json.dumps(run(sys.stdin.readline())), flush=True)
