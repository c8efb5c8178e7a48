"""Recordings and what is said: `audio` (path, bytes or samples) and `text`, `transcription` or `sentence`.

A `speaker`, where one is named, tells a model that speaks whose voice it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore import DataConfig, DataFormat, Refused, Shape, hookimpl
from ftcore_data._rows import Row, first, kind, missing, missing_all, not_text, sample

WORDS = ("text", "transcription", "transcript", "sentence")
SPEAKERS = ("speaker", "speaker_id", "source", "voice")
VOICES = sample("voices.jsonl")
"""Shipped rows at 24,000 samples a second, for models that speak; those of the format are at 16,000."""


@dataclass
class Config(DataConfig):
    """The audio format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `audio`."""
    return DataFormat(
        name="audio",
        shape=Shape.AUDIO,
        convert="ftcore_data.audio:convert",
        check="ftcore_data.audio:check",
        sample=sample("audio.jsonl"),
        over={"text": ("audio",)},
        columns=("audio", *WORDS, *SPEAKERS),
        media=("audio",),
        opens="ftcore_data.audio:opens",
    )


def check(row: Row) -> str | None:
    """A recording, and words."""
    if reason := missing(row, "audio"):
        return reason
    column = first(row, WORDS)
    if column is None:
        return missing_all(row, WORDS[:2])
    if not _is_audio(row["audio"]):
        return f"column 'audio' is {kind(row['audio'])}, not a recording\ngive the path of a sound file"
    return not_text(row, column)


def opens(source: Path | bytes) -> str | None:
    """Why a file is no recording, with the fix in a second line; None when it is one. Only its head is read.

    :param source: path or bytes.
    """
    from ftcore.audio import length

    try:
        length(source)
    except Refused as refused:
        name = "its bytes are no recording" if isinstance(source, bytes) else f"{source} is no recording"
        problem = refused.problems[0]
        detail = problem.message.partition(": ")[2]
        return f"{name} that can be read{f' ({detail})' if detail else ''}\n{problem.fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The recording as it is, the words as `text`, and the speaker, where one is named."""
    column = first(row, WORDS)
    assert column is not None
    return {"audio": row["audio"], "text": row[column]} | spoken(row)


def spoken(row: Row) -> dict[str, str]:
    """The speaker as text, if the row names one."""
    column = first(row, SPEAKERS)
    value = None if column is None else row[column]
    is_name = isinstance(value, (str, int)) and not isinstance(value, bool)
    return {"speaker": str(value)} if is_name and value != "" else {}


def _is_audio(value: Any) -> bool:
    """A path, bytes, what `datasets` keeps of them, or samples with their rate."""
    if isinstance(value, dict):
        has_samples = value.get("array") is not None and bool(value.get("sampling_rate"))
        return bool(value.get("bytes") or value.get("path")) or has_samples
    return bool(value) and (isinstance(value, (str, bytes)) or hasattr(value, "get_all_samples"))
