"""Bad rows of a run: the first one ends it, or up to one in a hundred are put aside and counted.

What is put aside stands in `bad_rows.jsonl` in the run folder, a line for each: where it is, and what is wrong with it.
"""

from __future__ import annotations

import json
from pathlib import Path

from ftcore.config import BadRows
from ftcore.errors import Exit, Problem, Refused
from ftcore.report import note
from ftcore.run_state import state_of
from ftcore.specs import Plan

FILE = "bad_rows.jsonl"
MOST = 0.01
"""Part of the rows that may be put aside."""
AT_FIRST = 1000
"""A stream's rows are counted as at least so many, so that a bad one among its first does not end the run."""


class Quarantine:
    """Takes bad rows, as many as the policy lets it.

    :param folder: run folder, or None where nothing is to be written.
    :param before: rows that an earlier stage of the same run put aside.
    """

    def __init__(self, policy: BadRows, folder: Path | None = None, before: int = 0) -> None:
        self.open = policy is BadRows.quarantine
        self.count = before
        self._file = folder / FILE if folder is not None else None
        self._before = before
        self._last: Problem | None = None
        self._seen: set[str] = set()

    @classmethod
    def of(cls, plan: Plan, fresh: bool = False) -> Quarantine:
        """The run's own: only a run that has begun writes into its folder, a preview of it does not.

        :param fresh: forget what an earlier reading of the same rows put aside.
        """
        assert plan.run.data is not None
        begun = state_of(plan.output_dir) == "running"
        file = plan.output_dir / FILE
        if begun and fresh:
            file.unlink(missing_ok=True)
        before = len(file.read_text(encoding="utf-8").splitlines()) if begun and file.is_file() else 0
        return cls(plan.run.data.bad_rows, plan.output_dir if begun else None, before)

    def add(self, problem: Problem, row: str | None = None) -> None:
        """Put a bad row aside. Raises Refused where it ends the run.

        :param row: what tells it from all others, where the problem's key does not: rows may be the same.
        """
        if not self.open:
            raise Refused(problem)
        row = row or problem.key
        if row in self._seen:  # a stream is read once an epoch
            return
        self._seen.add(row)
        self.count += 1
        self._last = problem
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"row": problem.key, "reason": problem.message, "fix": problem.fix}) + "\n")

    def limit(self, read: int) -> None:
        """Raises Refused when more rows than may be are put aside, of `read` in all, the bad ones among them."""
        if self._last is not None and self.count > MOST * read:
            raise Refused(too_many(self.count, read), self._last)

    def streamed(self, read: int) -> None:
        """The same of a stream, of which `read` rows were read so far."""
        self.limit(max(read, AT_FIRST))

    def say(self, read: int) -> None:
        """Tell how many rows were put aside since this was made, of `read`."""
        if fresh := self.count - self._before:
            where = f"; see {self._file}" if self._file is not None else ""
            note(f"{fresh} of {read} rows put aside, since they are bad{where}")


def too_many(bad: int, read: int) -> Problem:
    """More rows are bad than may be put aside."""
    message = f"{bad} of {read} rows are bad, and at most {MOST:.0%} may be put aside"
    return Problem("data.bad_rows", message, "mend the rows, or take them out", Exit.DATA)
