"""Core's formatting of rows: a format's columns, then ids and labels where the trainer takes tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import media
from ftcore.defaults.data import is_struct
from ftcore.errors import Refused
from ftcore.fingerprint import by_content
from ftcore.hooks import hookimpl
from ftcore.manager import import_function
from ftcore.mismatches import check_tokenizer
from ftcore.quarantine import Quarantine
from ftcore.rows import Places, local_files, row_problem, sources, without_nulls
from ftcore.specs import Plan, Shape
from ftcore.tokens import RowTokenizer
from ftcore.trained_part import without_untrained

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
BATCH = 100
Tokenize = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


@hookimpl(trylast=True)
def ftcore_format_dataset(plan: Plan, dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The format's `convert` on each row; then ids and labels, if the trainer takes tokens.

    One conversation becomes several training rows where the chat template rewrites earlier turns.
    """
    from datasets import DatasetDict

    assert plan.format is not None and plan.trainer is not None and plan.run.data is not None
    check_tokenizer(plan, tokenizer)
    streaming, aside = plan.run.data.streaming, Quarantine.of(plan)
    each = _each_row(plan, tokenizer, aside)
    # Never from the cache: `datasets` keys it by code and input, not by all that ours depends on.
    options: dict[str, Any] = {"batched": True, "batch_size": BATCH}
    options |= {} if streaming else {"load_from_cache_file": False}
    mixed = {} if streaming or each.tokenize else {"on_mixed_types": "use_json"}
    given = 0 if streaming else sum(map(len, dataset.values())) + aside.count
    formatted = {}
    for name, rows in dataset.items():
        rows, kinds = _exactly(rows, plan.format.columns)
        columns = list(rows.column_names or next(iter(rows)))
        call = partial(_batch, each=each, kinds=kinds, split=name, removed=frozenset(columns))
        if not (streaming or each.tokenize):
            options["batch_size"] = len(rows) if _has_other_columns(rows, each, kinds) else BATCH
        made = rows.map(call, with_indices=True, remove_columns=columns, **options, **mixed)
        if not streaming:
            made = by_content(made)
            aside.limit(given)
        if each.tokenize:
            made = without_untrained(name, made, None if streaming else len(rows), plan)
        formatted[name] = made
    if not streaming:
        aside.say(given)
    return DatasetDict(formatted)


@dataclass(frozen=True)
class _EachRow:
    """What is done with every row."""

    check: Callable[[Row], str | None] | None
    """For rows that no check has seen yet."""
    convert: Callable[[Row], Row]
    tokenize: Tokenize | None
    files: tuple[str, ...]
    """Columns that name files."""
    reach: media.Reach
    places: Places
    aside: Quarantine
    streaming: bool


def _each_row(plan: Plan, tokenizer: PreTrainedTokenizerBase, aside: Quarantine) -> _EachRow:
    data, form = plan.run.data, plan.format
    assert data is not None and form is not None and plan.trainer is not None
    paths = [*sources(data.path or form.sample), *filter(None, [data.eval_path, form.sample_eval])]
    files = [local_files(path) for path in paths]
    folders = [file.parent for found in files for file in found or ()]
    folders += [copy for path, found in zip(paths, files, strict=True) if found is None for copy in _hub_copies(path)]
    return _EachRow(
        # Rows of the hub were looked at in part only; those of files here are checked where they are read.
        check=import_function(form.check, "data") if None in files else None,
        convert=import_function(form.convert, "data"),
        tokenize=_tokenize(plan, tokenizer) if plan.trainer.tokenized else None,
        files=form.media,
        reach=media.Reach.of(data, folders),
        places=Places([path for path, found in zip(paths, files, strict=True) if found], form.media, data.columns),
        aside=aside,
        streaming=data.streaming,
    )


def _hub_copies(name: str) -> list[Path]:
    """Where `datasets` keeps the files of a data set of the hub, whose rows name them by these paths."""
    from datasets.config import EXTRACTED_DATASETS_PATH
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return [Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset"), Path(EXTRACTED_DATASETS_PATH)]


def _tokenize(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Tokenize:
    assert plan.format is not None and plan.trainer is not None and plan.run.trainer is not None
    length = plan.run.trainer.max_length
    if own := plan.family.row_tokenizers.get(plan.format.shape):
        make: Callable[[Plan, PreTrainedTokenizerBase], Tokenize] = import_function(own, "model")
        return make(plan, tokenizer)
    if plan.format.shape != Shape.IMAGES:
        return RowTokenizer(tokenizer, plan.format.shape, length, plan.trainer.splits)
    from ftcore.vision import ImageRowTokenizer

    return ImageRowTokenizer(tokenizer, plan.family.vision, length)


@dataclass(frozen=True)
class _Kinds:
    """Columns whose values are not as they were given."""

    exact: frozenset[str]
    """Text that is to be read as JSON."""
    filled: frozenset[str]
    """Objects of Arrow's, each with the keys of all others: a key without a value was most likely not there."""


def _exactly(rows: Any, read: Sequence[str]) -> tuple[Any, _Kinds]:
    """The rows with their objects as the text that they came as, which `datasets` would read with rounded numbers.

    Columns are named anew, since `datasets` gives a column of an old name its old type.

    :param read: Columns that the format reads; in those, objects are told and calls made, which nobody fills.
    """
    from datasets import Features, Json, List

    kinds = dict(rows.features or {})
    exact = {name: Json(decode=False) for name, kind in kinds.items() if kind == Json()}
    exact |= {name: List(Json(decode=False)) for name, kind in kinds.items() if kind == List(Json())}
    filled = frozenset(name for name, kind in kinds.items() if name in read and name not in exact and is_struct(kind))
    rows = rows.cast(Features(kinds | exact)) if exact else rows
    return rows.rename_columns({name: f"{RAW}{name}" for name in kinds}), _Kinds(frozenset(exact), filled)


RAW = "raw "
"""In front of the names of columns that are to be converted."""


def _batch(
    columns: dict[str, list[Any]],
    numbers: list[int],
    each: _EachRow,
    kinds: _Kinds,
    split: str,
    removed: frozenset[str],
) -> dict[str, list[Any]]:
    """The rows that are made of a batch.

    :param removed: Columns that `datasets` takes out; of a stream, a later row may have others.
    """
    made: list[Mapping[str, Any]] = []
    for number, row in zip(numbers, _rows(columns, kinds), strict=True):
        try:
            made += _made(row, each)
        except Refused as refused:
            nth = f"row {number + 1} of the {split} split"
            place = each.places.of(row, many=each.aside.open) or nth
            if not each.aside.open:
                raise _placed(refused, place) from refused
            each.aside.add(_placed(refused, place).problems[0], nth)
            if each.streaming:
                each.aside.streamed(number + 1)
    names = dict.fromkeys(chain(chain.from_iterable(made), (name for name in columns if name not in removed)))
    return {name: [row.get(name) for row in made] for name in names}


def _rows(columns: Mapping[str, list[Any]], kinds: _Kinds) -> Iterator[Row]:
    """The rows of a batch, as they were given."""
    names = [name.removeprefix(RAW) for name in columns]
    reads = [
        _read_text if name in kinds.exact else without_nulls if name in kinds.filled else _as_it_is for name in names
    ]
    for values in zip(*columns.values(), strict=True):
        yield {name: read(value) for name, read, value in zip(names, reads, values, strict=True)}


def _as_it_is(value: Any) -> Any:
    return value


def _has_other_columns(rows: Any, each: _EachRow, kinds: _Kinds) -> bool:
    """Whether a batch is converted to other columns than the first, or has a value in one where that has none.

    `datasets` takes the columns, and what is in them, from the first batch. Rows that cannot be converted are left to
    those who say so.
    """
    first: tuple[set[str], set[str]] | None = None
    for batch in rows.iter(BATCH) if len(rows) > BATCH else ():
        there, filled = set[str](), set[str]()
        for row in _rows(batch, kinds):
            with suppress(Exception):
                made = each.convert(row)
                there |= set(made)
                filled |= {name for name, value in made.items() if value is not None}
        first = first or (there, filled)
        if there != first[0] or not filled <= first[1]:
            return True
    return False


def _placed(refused: Refused, place: str) -> Refused:
    """What is wrong with a row's data, said of its file and line."""
    return Refused(*(replace(p, key=place) if p.key == "data" else p for p in refused.problems))


def _made(row: Row, each: _EachRow) -> Sequence[Mapping[str, Any]]:
    """The training rows of one row. Raises Refused for a bad one."""
    if reason := (each.check and each.check(row)) or media.reaching(row, each.files, each.reach):
        raise Refused(row_problem("data", reason))
    if each.files and each.reach.hosts:
        from ftcore.fetched import fetch

        row = media.fetched(row, each.files, partial(fetch, reach=each.reach))
    converted = each.convert(row)
    return each.tokenize(converted) if each.tokenize else [converted]


def _read_text(value: Any) -> Any:
    if isinstance(value, list):
        return [json.loads(item) for item in value]
    return json.loads(value) if isinstance(value, str) else value
