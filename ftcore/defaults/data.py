"""Core's reading and formatting of rows; the reading itself is done by `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.manager import import_function
from ftcore.rows import iter_rows, local_files
from ftcore.specs import Plan
from ftcore.tokens import IGNORED, tokenize_row

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from transformers import PreTrainedTokenizerBase


@hookimpl(trylast=True)
def ftcore_load_dataset(plan: Plan) -> DatasetDict:
    """Local files, a hub id, or the shipped sample; held-out rows from `eval_path`, `eval_size` or the sample's own."""
    from datasets import DatasetDict

    data, form = plan.run.data, plan.format
    assert data is not None and form is not None
    seed = plan.run.trainer.seed if plan.run.trainer else 0
    splits: dict[str, Any] = {"train": _read(data.path or form.sample, data.split, data.streaming)}
    held_out = data.eval_path or (form.sample_eval if data.path is None else None)
    if held_out:
        splits["eval"] = _read(held_out, data.split, data.streaming)
    elif data.eval_size and data.streaming:
        rows = int(data.eval_size)
        splits = {"eval": splits["train"].take(rows), "train": splits["train"].skip(rows)}
    elif data.eval_size:
        size = data.eval_size if data.eval_size < 1 else int(data.eval_size)
        parts = splits["train"].train_test_split(test_size=size, seed=seed)
        splits = {"train": parts["train"], "eval": parts["test"]}
    return DatasetDict(splits)


def _read(path: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    files = local_files(path)
    if files is None:
        return _from_hub(path, split, streaming)
    if all(file.suffix == ".parquet" for file in files):  # typed, and often large
        from datasets import load_dataset

        names = [glob.escape(str(file)) for file in files]
        return load_dataset("parquet", data_files=names, split="train", streaming=streaming)
    # The reader that checked the rows reads them again: another one would guess other types of `01001` and `None`.
    from datasets import Dataset, IterableDataset

    if streaming:
        return IterableDataset.from_generator(_rows, gen_kwargs={"files": files})
    rows = list(_rows(files))
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (TypeError, ValueError, OverflowError) as error:  # what Arrow raises
        message = f"a column holds values of several kinds: {' '.join(str(error).split())[:120]}"
        raise Refused(Problem(path, message, "give each column one kind of value", Exit.DATA)) from error


def _rows(files: list[Path]) -> Iterator[dict[str, Any]]:
    return (dict(row) for file in files for _, row in iter_rows(file))


def _from_hub(path: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    try:
        return load_dataset(path, split=split, streaming=streaming)
    except Exception as error:  # the hub's and the network's errors are many; all mean that the rows are not to be had
        message = f"the data set {path} cannot be loaded ({type(error).__name__})"
        fix = "give a local file, or check the hub id and data.split"
        raise Refused(Problem("data.path", message, fix, Exit.MISSING_INPUT)) from error


@hookimpl(trylast=True)
def ftcore_format_dataset(plan: Plan, dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The format's `convert` on each row; then ids and labels, if the trainer takes tokens."""
    from datasets import DatasetDict

    assert plan.format is not None and plan.trainer is not None and plan.run.trainer is not None
    convert = import_function(plan.format.convert, "data")
    length, shape = plan.run.trainer.max_length, plan.format.shape
    formatted = {}
    for name, rows in dataset.items():
        columns = list(rows.column_names or next(iter(rows)))
        # Never from the cache: `datasets` keys it by code and input, not by all that ours depends on.
        fresh = {} if plan.run.data and plan.run.data.streaming else {"load_from_cache_file": False}
        rows = rows.map(convert, remove_columns=columns, **fresh)
        if plan.trainer.tokenized:
            raw = list(rows.column_names or next(iter(rows)))
            options = {"tokenizer": tokenizer, "shape": shape, "max_length": length}
            rows = rows.map(_tokenize, fn_kwargs=options, remove_columns=raw, **fresh)
            rows = _without_untrained(name, rows, length, fresh)
        formatted[name] = rows
    return DatasetDict(formatted)


def _tokenize(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shape: str, max_length: int
) -> dict[str, list[int]]:
    return tokenize_row(tokenizer, row, shape, max_length)


def _trains(row: dict[str, Any]) -> bool:
    # The first label is never predicted, so a row whose only trained token is the first trains nothing.
    return any(label != IGNORED for label in row["labels"][1:])


def _without_untrained(name: str, rows: Any, length: int, fresh: dict[str, Any]) -> Any:
    """Rows without a single trained token, such as a prompt longer than max_length, are dropped out loud."""
    from ftcore.report import note

    kept = rows.filter(_trains, **fresh)
    try:
        before, after = len(rows), len(kept)
    except TypeError:  # a stream has no length
        return kept
    if after == 0:
        message = f"no row of the {name} split has a trained token within {length} tokens"
        raise Refused(Problem("data", message, "raise trainer.max_length, or see `ftcore preview`", Exit.DATA))
    if after < before:
        note(f"{before - after} of {before} {name} rows dropped: no trained token within trainer.max_length={length}")
    return kept
