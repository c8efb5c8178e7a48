"""What is measured on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any
"""A numpy array."""


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood of a token: among how many equally likely ones the model seems to choose.

    Infinite where it is more than a float holds.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def accuracy(predicted: Array, true: Array) -> float:
    """Part of the rows that are right; with several classes a row, all of them must be.

    :param predicted: Class numbers `[rows]`, or 0 and 1 `[rows, classes]`.
    """
    hits = predicted == true
    return float((hits if hits.ndim == 1 else hits.all(axis=1)).mean())


def macro_f1(predicted: Array, true: Array) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN), over those that are true or predicted somewhere.

    As scikit-learn's `f1_score(average="macro", zero_division=0)`, which leaves out classes that occur nowhere.
    """
    if predicted.ndim == 1:
        classes = np.union1d(predicted, true)
        predicted, true = predicted[:, None] == classes, true[:, None] == classes
    predicted, true = predicted.astype(bool), true.astype(bool)
    right = (predicted & true).sum(axis=0)
    occurring = predicted.sum(axis=0) + true.sum(axis=0)
    there = occurring > 0
    return float((2 * right[there] / occurring[there]).mean()) if there.any() else 0.0


def spearman(ours: Array, theirs: Array) -> float:
    """Correlation of the ranks of two columns `[rows]`; equal values share the mean of their ranks.

    Nan where one column is constant.
    """
    one, other = ranks(ours), ranks(theirs)
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / norm) if norm else float("nan")


def ranks(values: Array) -> Array:
    """Rank of each value from 0 on."""
    _, first, count = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(count) - count
    return (starts + (count - 1) / 2)[first]


def recall_at_1(anchors: Array, positives: Array) -> float:
    """Part of the anchors whose own positive is the closest of all; one that is as close as it counts as itself.

    :param anchors: Normalised embeddings `[rows, size]`, as `positives`.
    """
    scores = anchors @ positives.T
    return float((np.diagonal(scores) >= scores.max(axis=1) - 1e-6).mean())


def word_error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Wrong, missing and extra words by the number of words that were said, over all rows together.

    Case and punctuation do not count. More words than were said may be wrong, so it may be above 1.
    """
    pairs = [(words(one), words(other)) for one, other in zip(said, heard, strict=True)]
    return sum(edits(one, other) for one, other in pairs) / max(sum(len(one) for one, _ in pairs), 1)


def words(text: str) -> list[str]:
    """The words of a text, as Whisper's authors count them in any language."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return str(BasicTextNormalizer()(text)).split()


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Fewest words to replace, to take out and to put in (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, 1):
        before, row[0] = row[0], number
        for column, candidate in enumerate(other, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (word != candidate))
    return row[-1]
