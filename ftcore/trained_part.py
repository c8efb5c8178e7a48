"""Rows that train nothing are dropped and counted; a run that would hardly train anything does not begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.report import note
from ftcore.specs import Plan
from ftcore.tokens import IGNORED, TOKENIZED

LOOKED_AT = 1000
"""Rows of a stream by which the whole is judged."""


def without_untrained(split: str, rows: Any, given: int | None, plan: Plan) -> Any:
    """The rows without those of no trained token, such as a prompt longer than max_length.

    :param rows: with `labels`, of the same length as `input_ids`.
    :param given: how many rows they were made of; None for a stream, which is judged while it is read.
    :raises Refused: where nothing is left, or fewer than `data.min_trained` of the tokens are trained.
    """
    assert plan.run.data is not None and plan.trainer is not None and plan.run.trainer is not None
    # Of rows with images or recordings most tokens stand for those, and no part of them says anything.
    least = plan.run.data.min_trained if plan.format and plan.format.shape in TOKENIZED else 0.0
    part = TrainedPart(split, plan.run.trainer.max_length, least, streamed=given is None)
    if given is None:
        return rows.filter(part)
    kept = rows.filter(part, load_from_cache_file=False)
    part.judge()
    before, length = len(rows), plan.run.trainer.max_length
    if before > given:
        if plan.trainer.splits:
            note(f"{given} {split} texts became {before} rows of up to trainer.max_length={length} tokens")
        else:
            note(f"{given} {split} conversations became {before} rows: the chat template rewrites earlier turns")
    if len(kept) < before:
        dropped = before - len(kept)
        note(f"{dropped} of {before} {split} rows dropped: no trained token within trainer.max_length={length}")
    if part.full and not plan.trainer.splits:
        note(f"{part.full} of {before} {split} rows fill trainer.max_length={length}: what was longer is cut off")
    return kept


class TrainedPart:
    """Says of each row whether it trains anything, and counts: rows, tokens, and trained tokens."""

    def __init__(self, split: str, length: int, least: float, streamed: bool) -> None:
        self._split, self._length, self._least, self._streamed = split, length, least, streamed
        self.rows = self.kept = self.tokens = self.trained = self.full = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether the row trains anything. Raises Refused where a stream's first rows hardly do."""
        # The first label is never predicted, so a row whose only trained token is the first trains nothing.
        labels = row["labels"][1:]
        trained: int = len(labels) - labels.count(IGNORED)
        self.rows += 1
        self.kept += trained > 0
        self.full += trained > 0 and len(labels) + 1 == self._length
        self.tokens += len(labels)
        self.trained += trained
        if self._streamed and self.rows == LOOKED_AT:
            self.judge()
            if self.kept < self.rows:
                rest = f"no trained token within trainer.max_length={self._length}"
                note(f"{self.rows - self.kept} of the first {self.rows} {self._split} rows dropped: {rest}")
        return trained > 0

    def judge(self) -> None:
        """Raises Refused where no row was kept, or too few tokens are trained."""
        if not self.rows:
            return
        if not self.kept:
            message = f"no row of the {self._split} split has a trained token within {self._length} tokens"
            raise Refused(Problem("data", message, "raise trainer.max_length, or see `ftcore preview`", Exit.DATA))
        if self.trained < self._least * self.tokens:
            part = self.trained / self.tokens
            message = f"only {self.trained} of {self.tokens} tokens of the {self._split} split are trained"
            fix = f"look at them with `ftcore preview`; if they are meant, set data.min_trained={part / 2:.1g}"
            raise Refused(Problem("data", message, fix, Exit.DATA))
