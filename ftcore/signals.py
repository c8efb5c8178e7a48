"""The signals that tell a run to stop: of a scheduler (SIGTERM, SIGUSR1), and of a person (SIGINT, which is Ctrl-C)."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ftcore.errors import Exit

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


def numbers() -> list[signal.Signals]:
    """Those that this system has; none outside the main thread, where Python sets no handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside the block each of them raises KeyboardInterrupt, so that what is half written is cleared away.

    When one did, or the run was told to stop and did so, it stays like that: the process is about to end.
    """
    stopped = False
    with handled(signal.default_int_handler, lambda: stopped), _never_lost():
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == Exit.PREEMPTED
            raise


@contextmanager
def _never_lost() -> Iterator[None]:
    """A signal may come while Python runs a finalizer or a callback of its garbage collector.

    From there no exception gets out (:func:`sys.unraisablehook`), so KeyboardInterrupt is raised again a moment later.
    """
    before, later = sys.unraisablehook, threading.Timer(0, _interrupt)

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        nonlocal later
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
        elif not later.is_alive():
            later = threading.Timer(0.01, _interrupt)  # here it would be lost again
            later.daemon = True
            later.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        later.cancel()
        sys.unraisablehook = before


def _interrupt() -> None:
    """Ctrl-C in the main thread, also while it sleeps or waits, where the system can do that."""
    if hasattr(signal, "pthread_kill") and (main := threading.main_thread().ident):
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any], keep: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Inside the block `handler` is called for each of them.

    :param keep: Asked at the end: whether the handlers stay as they are then.
    """
    before = {number: signal.getsignal(number) for number in numbers()}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        if not keep():
            for number, old in before.items():
                signal.signal(number, old)


def ignore() -> None:
    """From here on they do nothing: the process is about to end, with an exit status of its own."""
    for number in numbers():
        signal.signal(number, signal.SIG_IGN)
