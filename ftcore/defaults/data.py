"""Core's reading and formatting of rows; the reading itself is done by `datasets`."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import media
from ftcore.columns import Columns, named_dataset, renamed
from ftcore.config import DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.manager import import_function
from ftcore.rows import iter_rows, local_files, place_of, sources
from ftcore.specs import DataFormat, Plan, Shape
from ftcore.tokens import IGNORED, RowTokenizer

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Tokenize = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


@hookimpl(trylast=True)
def ftcore_load_dataset(plan: Plan) -> DatasetDict:
    """Local files, hub ids, a mixture of them, or the shipped sample.

    Held-out rows come from `eval_path`, `eval_size` or the sample's own.
    """
    from datasets import DatasetDict

    data, form = plan.run.data, plan.format
    assert data is not None and form is not None
    seed = plan.run.trainer.seed if plan.run.trainer else 0
    splits: dict[str, Any] = {"train": _mixed(data, form, seed)}
    held_out = data.eval_path or (form.sample_eval if data.path is None else None)
    if held_out:
        splits["eval"] = _read(held_out, data, form)
    elif data.eval_size and data.streaming:
        rows = int(data.eval_size)
        splits = {"eval": splits["train"].take(rows), "train": splits["train"].skip(rows)}
    elif data.eval_size:
        size = data.eval_size if data.eval_size < 1 else int(data.eval_size)
        parts = splits["train"].train_test_split(test_size=size, seed=seed)
        splits = {"train": parts["train"], "eval": parts["test"]}
    return DatasetDict(splits)


def _mixed(data: DataConfig, form: DataFormat, seed: int) -> Dataset | IterableDataset:
    from datasets import concatenate_datasets, interleave_datasets

    parts = [_read(path, data, form) for path in sources(data.path or form.sample)]
    if len(parts) == 1:
        return parts[0]
    try:
        if not data.weights:
            return concatenate_datasets(parts)
        odds = [weight / sum(data.weights) for weight in data.weights]
        return interleave_datasets(parts, probabilities=odds, seed=seed, stopping_strategy="first_exhausted")
    except (TypeError, ValueError) as error:  # what `datasets` raises for columns that differ
        message = f"the paths hold columns of different kinds: {' '.join(str(error).split())[:120]}"
        raise Refused(Problem("data.path", message, "give all of them the same columns", Exit.DATA)) from error


def _read(path: str, data: DataConfig, form: DataFormat) -> Dataset | IterableDataset:
    files = local_files(path)
    if files is None:
        return named_dataset(_from_hub(path, data), data.columns)
    if all(file.suffix == ".parquet" for file in files):  # typed, and often large
        from datasets import load_dataset

        names = [glob.escape(str(file)) for file in files]
        rows = load_dataset("parquet", data_files=names, split="train", streaming=data.streaming)
        return named_dataset(rows, data.columns)
    # The reader that checked the rows reads them again: another one would guess other types of `01001` and `None`.
    from datasets import IterableDataset

    if data.streaming:
        given = {"files": files, "media_columns": form.media, "columns": data.columns}
        return IterableDataset.from_generator(_rows, gen_kwargs=given)
    return _in_memory(list(_rows(files, form.media, data.columns)), path)


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
        message = f"a column holds values of several kinds: {' '.join(str(error).split())[:120]}"
        raise Refused(Problem(path, message, "give each column one kind of value", Exit.DATA)) from error


def _lists_of_objects(values: list[Any]) -> bool:
    filled = [value for value in values if value is not None]
    return all(isinstance(v, list) and all(isinstance(item, Mapping) for item in v) for v in filled) and any(filled)


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [json.dumps(item) for item in value]
    return value if value is None else json.dumps(value)


def _rows(files: list[Path], media_columns: tuple[str, ...], columns: Columns) -> Iterator[Row]:
    for file in files:
        for _, row in renamed(iter_rows(file), columns):
            yield media.resolved(row, media_columns, file.parent)


def _from_hub(path: str, data: DataConfig) -> Dataset | IterableDataset:
    from datasets import load_dataset

    try:
        return load_dataset(path, data.subset, split=data.split, streaming=data.streaming)
    except Exception as error:  # the hub's and the network's errors are many; all mean that the rows are not to be had
        message = f"the data set {path} cannot be loaded ({type(error).__name__})"
        fix = "give a local file, or check the hub id, data.subset and data.split"
        raise Refused(Problem("data.path", message, fix, Exit.MISSING_INPUT)) from error


@hookimpl(trylast=True)
def ftcore_format_dataset(plan: Plan, dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The format's `convert` on each row; then ids and labels, if the trainer takes tokens.

    One conversation becomes several training rows where the chat template rewrites earlier turns.
    """
    from datasets import DatasetDict

    assert plan.format is not None and plan.trainer is not None and plan.run.trainer is not None
    convert = import_function(plan.format.convert, "data")
    length, streaming = plan.run.trainer.max_length, bool(plan.run.data and plan.run.data.streaming)
    tokenize = _tokenize(plan, tokenizer, length) if plan.trainer.tokenized else None
    # Never from the cache: `datasets` keys it by code and input, not by all that ours depends on.
    options: dict[str, Any] = {"batched": True, "batch_size": 100}
    options |= {} if streaming else {"load_from_cache_file": False}
    own_names = plan.run.data.columns if plan.run.data else {}
    place = partial(_place, paths=_paths(plan), media_columns=plan.format.media, columns=own_names)
    formatted = {}
    for name, rows in dataset.items():
        rows, exact = _exactly(rows)
        columns = list(rows.column_names or next(iter(rows)))
        mixed = {} if streaming or tokenize else {"on_mixed_types": "use_json"}
        made = rows.map(
            partial(_batch, convert=convert, tokenize=tokenize, exact=exact, place=place),
            remove_columns=columns,
            **options,
            **mixed,
        )
        formatted[name] = (
            _without_untrained(name, made, 0 if streaming else len(rows), plan, options) if tokenize else made
        )
    return DatasetDict(formatted)


def _tokenize(plan: Plan, tokenizer: PreTrainedTokenizerBase, length: int) -> Tokenize:
    assert plan.format is not None and plan.trainer is not None
    if own := plan.family.row_tokenizers.get(plan.format.shape):
        make: Callable[[Plan, PreTrainedTokenizerBase], Tokenize] = import_function(own, "model")
        return make(plan, tokenizer)
    if plan.format.shape != Shape.IMAGES:
        return RowTokenizer(tokenizer, plan.format.shape, length, plan.trainer.splits)
    from ftcore.vision import ImageRowTokenizer

    return ImageRowTokenizer(tokenizer, plan.family.vision, length)


def _exactly(rows: Any) -> tuple[Any, frozenset[str]]:
    """The rows with their objects as the text that they came as, which `datasets` would read with rounded numbers.

    Columns are named anew, since `datasets` gives a column of an old name its old type.
    """
    from datasets import Features, Json, List

    kinds = dict(rows.features or {})
    exact = {name: Json(decode=False) for name, kind in kinds.items() if kind == Json()}
    exact |= {name: List(Json(decode=False)) for name, kind in kinds.items() if kind == List(Json())}
    rows = rows.cast(Features(kinds | exact)) if exact else rows
    return rows.rename_columns({name: f"{RAW}{name}" for name in kinds}), frozenset(exact)


RAW = "raw "
"""In front of the names of columns that are to be converted."""


def _batch(
    columns: dict[str, list[Any]],
    convert: Callable[[Row], Row],
    tokenize: Tokenize | None,
    exact: frozenset[str],
    place: Callable[[Row], str | None],
) -> dict[str, list[Any]]:
    made: list[Mapping[str, Any]] = []
    names = [name.removeprefix(RAW) for name in columns]
    for values in zip(*columns.values(), strict=True):
        row = {name: _read_text(v) if name in exact else v for name, v in zip(names, values, strict=True)}
        try:
            converted = convert(row)
            made += tokenize(converted) if tokenize else [converted]
        except Refused as refused:
            raise _placed(refused, place(row)) from refused
    return {name: [row.get(name) for row in made] for name in dict.fromkeys(chain.from_iterable(made))}


def _read_text(value: Any) -> Any:
    if isinstance(value, list):
        return [json.loads(item) for item in value]
    return json.loads(value) if isinstance(value, str) else value


def _paths(plan: Plan) -> list[str]:
    data, form = plan.run.data, plan.format
    assert data is not None and form is not None
    return [*sources(data.path or form.sample), *filter(None, [data.eval_path, form.sample_eval])]


def _place(row: Row, paths: list[str], media_columns: tuple[str, ...], columns: Columns) -> str | None:
    """File and line of the row, looked for only once it is at fault."""
    return next(filter(None, (place_of(row, path, media_columns, columns) for path in paths)), None)


def _placed(refused: Refused, place: str | None) -> Refused:
    """What is wrong with a row's data, said of its file and line."""
    return Refused(*(replace(p, key=place) if place and p.key == "data" else p for p in refused.problems))


def _trains(row: dict[str, Any]) -> bool:
    # The first label is never predicted, so a row whose only trained token is the first trains nothing.
    return any(label != IGNORED for label in row["labels"][1:])


def _without_untrained(name: str, rows: Any, given: int, plan: Plan, options: dict[str, Any]) -> Any:
    """Rows without a single trained token, such as a prompt longer than max_length, are dropped out loud."""
    from ftcore.report import note

    assert plan.trainer is not None and plan.run.trainer is not None
    length = plan.run.trainer.max_length

    fresh = {key: value for key, value in options.items() if key == "load_from_cache_file"}
    kept = rows.filter(_trains, **fresh)
    try:
        before, after = len(rows), len(kept)
    except TypeError:  # a stream has no length
        return kept
    if after == 0:
        message = f"no row of the {name} split has a trained token within {length} tokens"
        raise Refused(Problem("data", message, "raise trainer.max_length, or see `ftcore preview`", Exit.DATA))
    if before > given:
        if plan.trainer.splits:
            note(f"{given} {name} texts became {before} rows of up to trainer.max_length={length} tokens")
        else:
            note(f"{given} {name} conversations became {before} rows: the chat template rewrites earlier turns")
    if after < before:
        note(f"{before - after} of {before} {name} rows dropped: no trained token within trainer.max_length={length}")
    return kept
