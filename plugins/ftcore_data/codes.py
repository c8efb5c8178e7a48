"""Speech as codes of SNAC at 24 kHz, seven a frame, and what is said: `codes` and `text`, perhaps with a `speaker`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, first, kind, missing_all, not_text, sample
from ftcore_data.audio import SPEAKERS, WORDS, spoken

CODES = ("codes", "codes_list")
CODEBOOK = 4096
"""Codes of each of SNAC's three codebooks."""
LAYERS = (0, 1, 2, 2, 1, 2, 2)
"""The codebook of each code of a frame: one of the first, two of the second, four of the third."""
FIRST_TOKEN = 128266
"""Id of the first code's token in the published Orpheus checkpoints."""
FORMS = {
    "codes": (0, 0),
    "codes with their place in the frame": (0, CODEBOOK),
    "token ids of Orpheus": (FIRST_TOKEN, CODEBOOK),
}
"""What the numbers may be, to what is added to all of them, and for each place in the frame."""


@dataclass
class Config(DataConfig):
    """The codes format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `codes`."""
    return DataFormat(
        name="codes",
        shape=Shape.CODES,
        convert="ftcore_data.codes:convert",
        check="ftcore_data.codes:check",
        sample=sample("codes.jsonl"),
        over={"text": CODES},
        columns=(*CODES, *WORDS, *SPEAKERS),
    )


def check(row: Row) -> str | None:
    """Whole frames of codes, and words."""
    column, words = first(row, CODES), first(row, WORDS)
    if column is None:
        return missing_all(row, CODES)
    if words is None:
        return missing_all(row, WORDS[:2])
    found = frames(row[column])
    if isinstance(found, str):
        return f"column '{column}' {found}"
    return not_text(row, words)


def convert(row: Row) -> dict[str, Any]:
    """The codes from 0 to 4095, frame by frame; the words as `text`, and the speaker, where one is named."""
    column, words = first(row, CODES), first(row, WORDS)
    assert column is not None and words is not None
    return {"codes": frames(row[column]), "text": row[words]} | spoken(row)


def frames(values: Any) -> list[int] | str:
    """Codes from 0 to 4095, seven a frame; or why they are none, with the fix in a second line.

    :param values: a flat list in one of `FORMS`, or SNAC's own three lists of n, 2n and 4n codes.
    """
    if not isinstance(values, list) or not values:
        what = "empty" if values == [] else kind(values)
        return f"is {what}, not a list of codes\ngive the codes of SNAC at 24 kHz, or take the row out"
    if all(isinstance(layer, list) for layer in values):
        lengths = [len(layer) for layer in values]
        if lengths != [lengths[0], 2 * lengths[0], 4 * lengths[0]] or not lengths[0]:
            said = ", ".join(map(str, lengths))
            return f"holds lists of {said} codes\nSNAC at 24 kHz has three, of n, 2n and 4n codes"
        values = interleaved(values)
    if strange := next((v for v in values if not isinstance(v, int) or isinstance(v, bool)), None):
        return f"holds {strange!r}, which is no code\ngive whole numbers"
    if len(values) % len(LAYERS):
        return f"holds {len(values)} codes, which are no whole frames\ngive seven for each frame"
    return _plain(values)


def _plain(values: Sequence[int]) -> list[int] | str:
    """The codes without what is added to them. No row is of two forms: their second codes share no number."""
    forms = {name: _places(len(values), *added) for name, added in FORMS.items()}
    for name, places in forms.items():
        if 0 <= values[1] - places[1] < CODEBOOK:
            codes = [value - place for value, place in zip(values, places, strict=True)]
            wrong = next((number for number, code in enumerate(codes) if not 0 <= code < CODEBOOK), None)
            if wrong is None:
                return codes
            low = places[wrong]
            fix = f"there, {name} are from {low} to {low + CODEBOOK - 1}"
            return f"holds {values[wrong]} as number {wrong + 1}, beyond SNAC's codebook\n{fix}"
    return (
        f"holds {values[1]} as number 2, which no code is\ngive the codes of SNAC at 24 kHz, from 0 to {CODEBOOK - 1}"
    )


def _places(count: int, start: int, step: int) -> list[int]:
    return [start + step * (number % len(LAYERS)) for number in range(count)]


def interleaved(layers: Sequence[Sequence[int]]) -> list[int]:
    """Three lists of n, 2n and 4n codes -> 7n, frame by frame in the order of `LAYERS`."""
    rest = [iter(layer) for layer in layers]
    return [next(rest[layer]) for _ in layers[0] for layer in LAYERS]
