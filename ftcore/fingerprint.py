"""A data set known by what it holds, so that no step behind ours finds rows of another one in the cache."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def by_content(rows: Dataset) -> Dataset:
    """The same rows, as a `map` just made them, under a fingerprint of their bytes.

    `datasets` makes one of the function's name and its arguments, not of its code. What a trainer's library maps later
    it looks for in the cache by that, and would find what an older version of a plugin made of the same file.
    """
    from datasets import Dataset

    total = hashlib.sha256(repr(rows.features).encode())
    for batch in rows.data.table.to_batches():
        total.update(batch.serialize())
    return Dataset(rows.data, rows.info, rows.split, fingerprint=total.hexdigest()[:16])
