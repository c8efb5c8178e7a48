"""Pairs of texts, and the losses of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused
from ftcore.errors import Exit
from ftcore_trainers._encoded import Encoder
from ftcore_trainers._local_rows import converted

if TYPE_CHECKING:
    import torch

FIRST, SECOND, NEGATIVE = "first", "second", "negative"


def problems(plan: Plan) -> Iterator[Problem]:
    """Rows are all of one kind, scores are such as a cosine can have, and a batch has negatives."""
    kinds: dict[bool, str] = {}
    low, high, worst = 0.0, 0.0, ""
    for place, row in converted(plan):
        score = row.get("score")
        kinds.setdefault(score is not None, place)
        if score is not None and max(abs(score), 1.0) > max(abs(low), abs(high), 1.0):
            worst = place
        low, high = min(low, score or 0.0), max(high, score or 0.0)
    if len(kinds) > 1:
        message = f"has a score, and the row at {kinds[False]} has none"
        yield Problem(kinds[True], message, "give all rows of a run the same columns", Exit.DATA)
    if worst:
        message = f"has the score {high if high > -low else low:g}, and a cosine is at most 1"
        yield Problem(worst, message, f"divide the scores by {max(high, -low):g}", Exit.DATA)
    trainer = plan.run.trainer
    if trainer is not None and False in kinds and 1 in (trainer.micro_batch, trainer.global_batch):
        key = "micro_batch" if trainer.micro_batch == 1 else "global_batch"
        message = "in a batch of 1 there are no other texts to tell the right one from"
        yield Problem(f"trainer.{key}", message, f"use trainer.{key}=32, or as many as fit")


def one_left(rows: Any, micro_batch: int) -> bool:
    """Whether the last micro-batch of an epoch is one pair without a score: with no negatives, its loss is 0.

    A stream has no length, and a single row is left alone in any case.
    """
    count = len(rows) if hasattr(rows, "__len__") else 0
    return count > micro_batch > 1 and count % micro_batch == 1 and rows[0].get("score") is None


@dataclass(frozen=True)
class Pairs:
    """Collates pairs, each text of them tokenized by itself."""

    encode: Encoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the inputs of each part by name, and `labels`: scores `[rows]` or the numbers of the rows.

        Beside pairs without scores stands `same [rows, rows]`: where another row has the very same second text.
        Raises Refused for a score that no cosine has: rows that no plan has seen.
        """
        import torch

        if rows[0].get("score") is not None:
            if (most := max(abs(float(row["score"])) for row in rows)) > 1:
                message = f"a row has a score of {most:g} in size, and a cosine is at most 1"
                raise Refused(Problem("data", message, "divide the scores by the largest one", Exit.DATA))
            batch = {FIRST: self._all(rows, "sentence1"), SECOND: self._all(rows, "sentence2")}
            return batch | {"labels": torch.tensor([float(row["score"]) for row in rows])}
        texts = [row["positive"] for row in rows]
        batch = {FIRST: self._all(rows, "anchor"), SECOND: self.encode(texts)}
        if negatives := [row["negative"] for row in rows if row.get("negative")]:
            batch[NEGATIVE] = self.encode(negatives)
        same = [[one == other and i != j for j, other in enumerate(texts)] for i, one in enumerate(texts)]
        return batch | {"same": torch.tensor(same), "labels": torch.arange(len(rows))}

    def _all(self, rows: Sequence[dict[str, Any]], column: str) -> dict[str, Any]:
        return self.encode([row[column] for row in rows])


def ranking_loss(
    first: torch.Tensor, second: torch.Tensor, negatives: torch.Tensor | None, same: torch.Tensor, scale: float
) -> torch.Tensor:
    """Multiple negatives ranking: cross entropy of each first text's own second among all of the batch.

    Henderson et al. 2017 (arXiv 1705.00652), with scaled cosines as in sentence-transformers'
    `MultipleNegativesRankingLoss`; unlike there, a second text that is the row's own one over again is no negative.

    :param first: Unit vectors `[rows, size]`, as `second`.
    :param negatives: Unit vectors `[any, size]` of texts that are wrong for every row.
    :param same: `[rows, rows]`, true where another row has the same second text.
    :param scale: Factor of the cosines: the inverse of a temperature.
    """
    import torch

    scores = scale * first @ second.T
    scores = scores.masked_fill(same, float("-inf"))
    if negatives is not None:
        scores = torch.cat([scores, scale * first @ negatives.T], dim=1)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(first), device=first.device))


def cosine_loss(first: torch.Tensor, second: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the cosine, as sentence-transformers' `CosineSimilarityLoss` (arXiv 1908.10084).

    :param first: Unit vectors `[rows, size]`, as `second`.
    :param scores: `[rows]`, from -1 to 1.
    """
    import torch

    return torch.nn.functional.mse_loss((first * second).sum(dim=-1), scores.float())
