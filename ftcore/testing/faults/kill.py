"""Runs in a process of their own, to be told to stop or killed: at a random moment, or after a step."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class Child:
    """`ftcore WORDS` in a process of its own; what it prints goes into `log`.

    :param folder: The run folder, which the words may name themselves instead.
    :param warm: Fork this process, with everything that it has imported, instead of starting Python anew.
    """

    def __init__(self, words: list[str], folder: Path, log: Path | None = None, warm: bool = False) -> None:
        self.folder, self.log = folder, log or folder.with_name(f"{folder.name}.log")
        self.words = [*words, *([] if any(w.startswith("output_dir=") for w in words) else [f"output_dir={folder}"])]
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.words, self.log, warm)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else None
        return self._code

    def wait(self, seconds: float = 300.0) -> int:
        """The exit status. Raises TimeoutError, with the process killed, when it takes longer."""
        if not self.until(lambda: False, seconds):
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.said()}")
        assert self._code is not None
        return self._code

    def until(self, there: Callable[[], bool], seconds: float = 300.0) -> bool:
        """Wait until something is there, or the process ended; False when that takes longer."""
        end = time.monotonic() + seconds
        while self.poll() is None and not there():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def until_step(self, step: int, seconds: float = 300.0) -> None:
        """Wait until it has logged a step. Raises AssertionError when it ended before."""
        reached = self.until(lambda: last_step(self.folder) >= step, seconds)
        assert reached, f"not at step {step} after {seconds} s:\n{self.said()}"
        assert last_step(self.folder) >= step, self.said()

    def send(self, name: str) -> None:
        """Send a signal: `SIGTERM`, `SIGKILL`."""
        if self.poll() is None:
            os.kill(self.pid, getattr(signal, name))

    def kill(self) -> int:
        """Kill it (`kill -9`), and wait until it is gone; its exit status, which tells whether it had ended before."""
        self.send("SIGKILL")
        return self.wait()

    def kill_within(self, seconds: float, draw: random.Random) -> int | None:
        """Kill it at a random moment of the next `seconds`; its exit status, or None where the kill ended it."""
        if self.until(lambda: False, draw.random() * seconds):
            return self._code
        code = self.kill()
        return None if code == -signal.SIGKILL else code

    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""


def last_step(folder: Path) -> int:
    """The last step that the run in `folder` logged; 0 before the first."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _become(words: list[str], log: Path, warm: bool) -> None:
    """The command in this process, which was forked for it; never returns."""
    code = 1
    try:
        with log.open("a", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        # A test runner has put objects of its own here, and handlers of its own there.
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        sys.unraisablehook = sys.__unraisablehook__
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not warm:
            os.execv(sys.executable, [sys.executable, "-m", "ftcore", *words])
        from ftcore.cli import main

        main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
