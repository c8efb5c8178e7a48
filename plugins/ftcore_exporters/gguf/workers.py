"""Rows into blocks on all cores: K-quants search for their scales, at some 7 million values a second and core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gguf import GGMLQuantizationType as Type

from ftcore import Problem, Refused
from ftcore.errors import Exit
from ftcore.redaction import without_secrets
from ftcore_exporters.gguf.mixes import size
from ftcore_exporters.gguf.worker import HEAD

SLOW = frozenset({Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K})
PIECE = 2**19
"""Values that one process is given at once: 2 MiB in float32."""
MOST = 8
"""Processes; each holds some 50 MB."""


class Quantizers:
    """Processes that are started when they are first needed, and end with the `with`.

    :param count: How many; None takes a process for each core, up to `MOST`.
    """

    def __init__(self, count: int | None = None) -> None:
        affinity = getattr(os, "sched_getaffinity", None)
        self.count = count or min(MOST, len(affinity(0)) if affinity else os.cpu_count() or 1)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self.count)

    def __enter__(self) -> Quantizers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.communicate()

    def blocks(self, rows: Any, kind: Type) -> Iterator[Any]:
        """The bytes of the rows, in order.

        :param rows: `[rows, width]`, a contiguous numpy array of float32.

        Raises Refused when a process dies.
        """
        import libgguf  # type: ignore[import-untyped]

        if kind not in SLOW or rows.size <= PIECE or self.count == 1:
            yield libgguf.quantize_rows(rows, kind).data
            return
        self._start()
        step = max(1, PIECE // rows.shape[-1])
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        yield from self._threads.map(lambda piece: self._packed(piece, kind), pieces)

    def _start(self) -> None:
        for _ in range(self.count - len(self._processes)):
            command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=without_secrets(), start_new_session=True
            )
            self._processes.append(process)
            self._idle.put(process)

    def _packed(self, piece: Any, kind: Type) -> bytes:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(HEAD.pack(int(kind), *piece.shape))
            process.stdin.write(piece.data)
            process.stdin.flush()
            found = process.stdout.read(wanted := size(kind, piece.shape))
        except BrokenPipeError:
            found, wanted = b"", 1
        finally:
            self._idle.put(process)
        if len(found) != wanted:
            raise Refused(Problem("export.gguf", "a process that packs weights was ended", "try again", Exit.IO))
        return found
