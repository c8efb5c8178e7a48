"""Every way a run can be refused, and the exit code each one ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Process exit codes; the values follow BSD ``sysexits.h`` where it has one."""

    DONE = 0
    CONFIG = 2
    DATA = 65
    MISSING_INPUT = 66
    NUMERIC = 70
    BUSY = 73
    IO = 74
    PREEMPTED = 75


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run, found before any weight is read."""

    key: str
    """The config key, file or row at fault."""
    message: str
    """What is wrong, one sentence."""
    fix: str = ""
    """What to do about it: a command, a key or a value; empty when the message says it all."""
    code: Exit = Exit.CONFIG

    def lines(self) -> list[str]:
        """The problem as it is printed: at most a line and a fix."""
        head = f"{self.key}: {self.message}" if self.key else self.message
        return [head, f"    fix: {self.fix}"] if self.fix else [head]


class FtcoreError(Exception):
    """Base of all errors that end in one clear message instead of a traceback."""

    code: Exit = Exit.CONFIG


class Refused(FtcoreError):
    """One or more problems; all of them are shown together."""

    shown = 4  # more than this many would push the first one off a short terminal

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        # A wrong config makes every later finding doubtful, so its code wins.
        self.code = min((p.code for p in problems), default=Exit.CONFIG)
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message: a count when there are several, then each problem with its fix."""
        lines = [f"{len(self.problems)} problems:"] if len(self.problems) > 1 else []
        for problem in self.problems[: self.shown]:
            lines += problem.lines()
        if len(self.problems) > self.shown:
            lines.append(f"and {len(self.problems) - self.shown} more; mend these first")
        return "\n".join(lines)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise :class:`Refused` when there is anything to refuse."""
    if problems:
        raise Refused(*problems)


class PluginConflict(FtcoreError):
    """Two selected plugins answer the same first-result hook."""


class PluginError(FtcoreError):
    """A plugin cannot be imported, or its hooks do not match the specs."""


class NoAnswer(FtcoreError):
    """No plugin answered a hook that needs an answer."""
