"""A call that may take only so long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class OutOfTime(BaseException):
    """A call took longer than it may. Not an Exception: code that catches those must not swallow it."""


def call_within(seconds: float, function: Callable[..., T], *args: Any, in_thread: bool = False) -> T:
    """What `function` returns, in at most `seconds`; 0 has no limit.

    In the main thread of a POSIX system the call is ended, even inside a regular expression. Elsewhere, and where a
    thread is asked for, it goes on in one of its own whose result is thrown away. Raises OutOfTime, and what the
    function raises.
    """
    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if in_thread or (seconds > 0 and not alarm):
        return _by_thread(seconds, function, args)
    return _by_alarm(seconds, function, args) if seconds > 0 else function(*args)


def _by_alarm(seconds: float, function: Callable[..., T], args: Any) -> T:
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _by_thread(seconds: float, function: Callable[..., T], args: Any) -> T:
    outcome: list[T | BaseException] = []

    def work() -> None:
        try:
            outcome.append(function(*args))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds or None)
    if not outcome:
        raise OutOfTime
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
