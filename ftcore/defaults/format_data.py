"""Core's formatting of rows: a format's columns, then ids and labels where the trainer takes tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import media
from ftcore.errors import Refused
from ftcore.fingerprint import by_content
from ftcore.hooks import hookimpl
from ftcore.manager import import_function
from ftcore.mismatches import check_tokenizer
from ftcore.quarantine import Quarantine
from ftcore.rows import Places, local_files, row_problem, sources
from ftcore.specs import Plan, Shape
from ftcore.tokens import RowTokenizer
from ftcore.trained_part import without_untrained

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
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
    options: dict[str, Any] = {"batched": True, "batch_size": 100}
    options |= {} if streaming else {"load_from_cache_file": False}
    mixed = {} if streaming or each.tokenize else {"on_mixed_types": "use_json"}
    given = 0 if streaming else sum(map(len, dataset.values())) + aside.count
    formatted = {}
    for name, rows in dataset.items():
        rows, exact = _exactly(rows)
        columns = list(rows.column_names or next(iter(rows)))
        call = partial(_batch, each=each, exact=exact, split=name)
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
    columns: dict[str, list[Any]], numbers: list[int], each: _EachRow, exact: frozenset[str], split: str
) -> dict[str, list[Any]]:
    made: list[Mapping[str, Any]] = []
    names = [name.removeprefix(RAW) for name in columns]
    for number, *values in zip(numbers, *columns.values(), strict=True):
        row = {name: _read_text(v) if name in exact else v for name, v in zip(names, values, strict=True)}
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
    return {name: [row.get(name) for row in made] for name in dict.fromkeys(chain.from_iterable(made))}


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
