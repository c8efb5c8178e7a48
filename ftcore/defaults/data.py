"""Core's reading of rows, which is done by `datasets`."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.columns import named_dataset
from ftcore.config import DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.media import resolved
from ftcore.quarantine import Quarantine
from ftcore.row_checks import good_rows, streamed_rows
from ftcore.rows import all_held_out, local_files, sources, without_nulls
from ftcore.specs import DataFormat, Plan

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features, IterableDataset

Row = dict[str, Any]
WHOLE = 2**32
"""Bytes of a Parquet file up to which all of it is hashed; reading more takes minutes."""
ENDS = 2**20
"""Bytes at the front and the end of a larger one that stand for it, with its size and its time."""


@hookimpl(trylast=True)
def ftcore_load_dataset(plan: Plan) -> DatasetDict:
    """Local files, hub ids, a mixture of them, or the shipped sample.

    Held-out rows come from `eval_path`, `eval_size` or the sample's own.
    """
    from datasets import DatasetDict

    data, form = plan.run.data, plan.format
    assert data is not None and form is not None
    seed = plan.run.trainer.seed if plan.run.trainer else 0
    aside = Quarantine.of(plan, fresh=True)
    splits: dict[str, Any] = {"train": _mixed(data, form, seed, aside)}
    held_out = data.eval_path or (form.sample_eval if data.path is None else None)
    if held_out:
        splits["eval"] = _read(held_out, data, form, aside)
    elif data.eval_size and data.streaming:
        rows = int(data.eval_size)
        splits = {"eval": splits["train"].take(rows), "train": splits["train"].skip(rows)}
    elif data.eval_size:
        size = data.eval_size if data.eval_size < 1 else int(data.eval_size)
        if size >= len(splits["train"]):
            raise Refused(all_held_out(int(size), len(splits["train"])))
        parts = splits["train"].train_test_split(test_size=size, seed=seed)
        splits = {"train": parts["train"], "eval": parts["test"]}
    if not data.streaming:
        read = sum(map(len, splits.values())) + aside.count
        aside.limit(read)
        aside.say(read)
    return DatasetDict(splits)


def _mixed(data: DataConfig, form: DataFormat, seed: int, aside: Quarantine) -> Dataset | IterableDataset:
    parts = [_read(path, data, form, aside) for path in sources(data.path or form.sample)]
    return _joined(parts if data.streaming else _alike(parts, form), data.weights, seed)


def _alike(parts: list[Dataset], form: DataFormat) -> list[Dataset]:
    """Arrow's objects as those of JSON, where another path has such: `datasets` joins columns of one kind alone."""
    from datasets import Json, List, concatenate_datasets

    exact = {name for part in parts for name, kind in part.features.items() if kind in (Json(), List(Json()))}
    made = []
    for part in parts:
        names = [name for name in part.column_names if name in exact and is_struct(part.features[name])]
        if names:
            filled = part.select_columns(names)
            rows = [{n: without_nulls(v) if n in form.columns else v for n, v in row.items()} for row in filled]
            given = concatenate_datasets([part.remove_columns(names), _in_memory(rows, "data.path")], axis=1)
            part = given.select_columns(part.column_names)
        made.append(part)
    return made


def is_struct(kind: Any) -> bool:
    """Whether a column holds objects of Arrow's, or lists of them, each with the keys of all others."""
    inner = getattr(kind, "feature", None)  # of a list
    return isinstance(kind, dict) or (inner is not None and is_struct(inner))


def _joined(parts: list[Any], weights: Sequence[float] = (), seed: int = 0) -> Any:
    """All rows of all parts, or rows drawn from them by weight. Raises Refused where their columns differ."""
    from datasets import concatenate_datasets, interleave_datasets

    if len(parts) == 1:
        return parts[0]
    try:
        if not weights:
            return concatenate_datasets(parts)
        odds = [weight / sum(weights) for weight in weights]
        return interleave_datasets(parts, probabilities=odds, seed=seed, stopping_strategy="first_exhausted")
    except (TypeError, ValueError) as error:  # what `datasets` raises for columns that differ
        message = f"the paths hold columns of different kinds: {' '.join(str(error).split())[:120]}"
        raise Refused(Problem("data.path", message, "give all of them the same columns", Exit.DATA)) from error


def _read(path: str, data: DataConfig, form: DataFormat, aside: Quarantine) -> Dataset | IterableDataset:
    files = local_files(path)
    if files is None:
        return named_dataset(_undecoded(_from_hub(path, data)), data.columns)
    # The reader that checked the rows reads them again: another one would guess other types of `01001` and `None`.
    if data.streaming:
        from datasets import IterableDataset

        given = {"files": files, "form": form, "data": data, "aside": aside}
        return IterableDataset.from_generator(streamed_rows, gen_kwargs=given)
    if all(file.suffix.lower() == ".parquet" for file in files):  # typed, and often large
        # Typed as one where that can be: each file's own nulls would give it types of its own.
        groups, kinds = [[file] for file in files] if form.media or aside.open else [files], _kinds(files)
        return _joined([_parquet(group, data, form, aside, kinds) for group in groups])
    good = (row for file in files for _, row in good_rows(file, form, data, aside, checked=not aside.open))
    rows = [dict(row) for row in good]
    if not rows:
        aside.limit(aside.count)
    return _in_memory(rows, path)


def _kinds(files: list[Path]) -> Features | None:
    """The columns of all of the files, where they differ: `datasets` would go by those of the first. None else."""
    import pyarrow
    import pyarrow.parquet as parquet
    from datasets import Features

    schemas = [parquet.read_schema(file) for file in files]
    if all(schema == schemas[0] for schema in schemas):
        return None
    try:
        return Features.from_arrow_schema(pyarrow.unify_schemas(schemas, promote_options="permissive"))
    except pyarrow.ArrowException:  # text and numbers: `datasets` may still make one of the other
        return None


def _parquet(
    files: list[Path], data: DataConfig, form: DataFormat, aside: Quarantine, kinds: Features | None
) -> Dataset:
    """Files of one folder, of which each is a group of its own where its rows are looked at one by one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    names = [glob.escape(str(file)) for file in files]
    try:
        # `datasets` keeps what it read by the files' names and times: by their bytes, it never gives those of an older.
        rows = load_dataset("parquet", f"bytes-{_hash(files)}", data_files=names, features=kinds, split="train")
    except DatasetGenerationError as error:
        message = f"the files hold columns of different kinds: {' '.join(str(error.__cause__).split())[:120]}"
        fix = "give all of them the same columns"
        raise Refused(Problem(str(files[0].parent), message, fix, Exit.DATA)) from error
    rows = named_dataset(_undecoded(rows), data.columns)
    if aside.open:
        rows = rows.select([number for number, _ in good_rows(files[0], form, data, aside, checked=False)])
    if form.media:
        given = {"columns": form.media, "folder": files[0].parent}
        rows = rows.map(resolved, fn_kwargs=given, features=rows.features, load_from_cache_file=False)
    return rows


def _hash(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        about = file.stat()
        with file.open("rb") as handle:
            if about.st_size <= WHOLE:
                total.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            total.update(f"{about.st_size} {about.st_mtime_ns}".encode())
            total.update(handle.read(ENDS))
            handle.seek(-ENDS, 2)  # where Parquet keeps what it counts of its columns
            total.update(handle.read())
    return total.hexdigest()[:16]


def _undecoded(rows: Any) -> Any:
    """Images and recordings as bytes and paths: `datasets` would open, or fetch, whatever the paths say."""
    from datasets import Features

    kinds = dict(rows.features or {})
    plain = {name: _plain(kind) for name, kind in kinds.items()}
    return rows.cast(Features(plain)) if plain != kinds else rows


def _plain(kind: Any) -> Any:
    from datasets import Audio, Image, LargeList, List, Video

    if isinstance(kind, (Audio, Image, Video)):
        return replace(kind, decode=False)
    if isinstance(kind, (List, LargeList)):
        return replace(kind, feature=_plain(kind.feature))
    return {name: _plain(inner) for name, inner in kind.items()} if isinstance(kind, dict) else kind


def _in_memory(rows: list[Row], path: str) -> Dataset:
    from datasets import Dataset, Features, Json, List, concatenate_datasets

    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}
    # Arrow would give every object the keys of all others, and a tool's call arguments that nobody wrote.
    objects = {name: Json() for name, values in columns.items() if any(isinstance(v, Mapping) for v in values)}
    lists = {name: List(Json()) for name, values in columns.items() if _lists_of_objects(values)}
    kinds = objects | lists
    texts = {name: [_as_text(value) for value in columns[name]] for name in kinds}
    plain = {name: values for name, values in columns.items() if name not in kinds}
    try:
        parts = [Dataset.from_dict(plain)] if plain else []
        parts += [Dataset.from_dict(texts, features=Features(kinds))] if kinds else []
        return concatenate_datasets(parts, axis=1).select_columns(list(columns))
    except (TypeError, ValueError, OverflowError) as error:  # what Arrow raises
        message = f"column '{_torn(plain)}' holds values of several kinds: {' '.join(str(error).split())[:120]}"
        fix = "give it one kind of value, or take it out where it is not read"
        raise Refused(Problem(path, message, fix, Exit.DATA)) from error


def _torn(columns: Mapping[str, list[Any]]) -> str:
    """The column whose values Arrow does not take together."""
    import pyarrow

    for name, values in columns.items():
        try:
            pyarrow.array(values)
        except (TypeError, ValueError, OverflowError):
            return name
    return ", ".join(columns)


def _lists_of_objects(values: list[Any]) -> bool:
    filled = [value for value in values if value is not None]
    return all(isinstance(v, list) and all(isinstance(item, Mapping) for item in v) for v in filled) and any(filled)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [json.dumps(item) for item in value]
    return value if value is None else json.dumps(value)


def _from_hub(path: str, data: DataConfig) -> Dataset | IterableDataset:
    from datasets import load_dataset

    try:
        return load_dataset(path, data.subset, split=data.split, streaming=data.streaming)
    except Exception as error:  # the hub's and the network's errors are many; all mean that the rows are not to be had
        message = f"the data set {path} cannot be loaded ({type(error).__name__})"
        fix = "give a local file, or check the hub id, data.subset and data.split"
        raise Refused(Problem("data.path", message, fix, Exit.MISSING_INPUT)) from error
