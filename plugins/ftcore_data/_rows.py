"""Checks and conversions that formats share.

A check returns why a row is bad, or None; a second line, where there is one, says what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftcore.catalog import nearest

NO_COLUMN = "has no column"
UNUSED = "has a column"
OTHER_FORMAT = (NO_COLUMN, UNUSED)
"""How every reason begins that says a row is of another format, rather than a bad one of this."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")

Row = Mapping[str, Any]


def sample(name: str) -> str:
    """Path of shipped rows."""
    return str(Path(__file__).parent / "samples" / name)


def missing(row: Row, *columns: str) -> str | None:
    """The first column that is absent."""
    absent = next((c for c in columns if c not in row), None)
    if absent is None:
        return None
    near = nearest(absent, row)
    fix = f"rename '{near}' to '{absent}'" if near else "rename the column, or name the format that fits with data=NAME"
    return f"{NO_COLUMN} '{absent}' (it has {', '.join(row) or 'none'})\n{fix}"


def missing_all(row: Row, columns: Iterable[str]) -> str:
    """None of several columns is there."""
    names = " or ".join(f"'{name}'" for name in columns)
    return (
        f"{NO_COLUMN} {names} (it has {', '.join(row) or 'none'})\nrename the column, or name the format with data=NAME"
    )


def first(row: Row, columns: Iterable[str]) -> str | None:
    """The first of the columns that the row has."""
    return next((name for name in columns if name in row), None)


def first_pair(row: Row, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The first of the pairs of columns that the row has both of."""
    return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)


def unused(row: Row, *columns: str) -> str | None:
    """A filled column that rows of the format do not use: leaving it out would change what is learnt."""
    name = next((c for c in columns if row.get(c) not in (None, "", [])), None)
    return name and f"{UNUSED} '{name}' that rows of this format do not use\ntake it out, or name the format that does"


def not_text(row: Row, column: str, empty_ok: bool = False) -> str | None:
    """The column holds no words."""
    value = row.get(column)
    if not isinstance(value, str):
        return f"column '{column}' is {kind(value)}, not text\nput text in '{column}', or take the row out"
    return (
        None
        if value.strip() or empty_ok
        else f"column '{column}' is empty\nput text in '{column}', or take the row out"
    )


def one_of(word: object, known: Iterable[str]) -> str:
    """The fix for a word that is not known."""
    near = nearest(str(word), known)
    return f"did you mean '{near}'?" if near else f"known: {', '.join(known)}"


TRUTH = {"true": True, "false": False, "1": True, "0": False}


def truth(value: Any) -> bool | None:
    """True or false as JSON, numbers and tables write them; None for anything else."""
    return value if isinstance(value, bool) else TRUTH.get(str(value).lower())


def kind(value: Any) -> str:
    """What a value is, in words."""
    names = {"NoneType": "null", "str": "text", "dict": "an object", "list": "a list", "bool": "true or false"}
    names |= {"int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
