"""The worker's process as the client sees it: requests, answers, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ftcore.redaction import without_secrets

PATIENCE = 900.0
"""Seconds after which a worker that does not answer is given up."""


class Stopped(Exception):
    """The worker ended; the message says how, with the last lines that it wrote."""


class Declined(Exception):
    """llama.cpp refused a request; the message is its reason."""


class Process:
    """`python -m ftcore.llama_cpp.worker`; end it with `close`."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "ftcore.llama_cpp.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is ours to handle; the worker ends with its input
        )

    def ask(self, **request: Any) -> Any:
        """Send one request; its value, or its bytes. Raises Declined, or Stopped where no answer comes."""
        timer = threading.Timer(PATIENCE, self._popen.kill)
        timer.daemon = True
        timer.start()
        try:
            head, data = self._answer(request)
        except (BrokenPipeError, json.JSONDecodeError):
            head, data = {}, None
        finally:
            timer.cancel()
        if "error" in head:
            raise Declined(head["error"])
        if "value" not in head and data is None:
            raise Stopped(self._last_words())
        return data if data is not None else head["value"]

    def close(self) -> None:
        """End the worker; its memory goes with it."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(BrokenPipeError):  # it ended before it read all
                if pipe is not None:
                    pipe.close()
        self._ended()
        self._errors.close()

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray | None]:
        requests, answers = self._popen.stdin, self._popen.stdout
        assert requests is not None and answers is not None
        requests.write(json.dumps(request).encode() + b"\n")
        requests.flush()
        head: dict[str, Any] = json.loads(answers.readline() or b"{}")
        count = head.get("bytes")
        data = None if count is None else bytearray(answers.read(count))
        return head, data if data is not None and len(data) == count else None

    def _ended(self) -> int:
        """The exit code, after a moment to end by itself."""
        try:
            return self._popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()

    def _last_words(self) -> str:
        code = self._ended()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if -code == signal.SIGILL:
            how += ", this CPU lacks instructions that the installed llama.cpp was built for"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return "; ".join([how, *lines[-3:]])


def _environment() -> dict[str, str]:
    """Our environment without its secrets, in which the worker finds the same ftcore as we did."""
    home = str(Path(__file__).resolve().parents[2])
    return {**without_secrets(), "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH", "")]))}
