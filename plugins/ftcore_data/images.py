"""Conversations about images: `images` (or `image`) as paths, bytes or PIL, and `messages` or ShareGPT's turns.

`<image>` in the words, or a part of type `image`, says where each stands; without either they come first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data import sharegpt
from ftcore_data._messages import Message, check_messages, check_system, plain_messages, with_system
from ftcore_data._rows import Row, first, kind, missing_all, sample, unused

IMAGES = ("images", "image")
TALKS = ("messages", "conversations")
HERE = "<image>"


@dataclass
class Config(DataConfig):
    """The images format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `images`: the images, and messages whose contents are lists of parts."""
    return DataFormat(
        name="images",
        shape=Shape.IMAGES,
        convert="ftcore_data.images:convert",
        check="ftcore_data.images:check",
        sample=sample("images.jsonl"),
        columns=(*IMAGES, *TALKS, "system"),
        media=IMAGES,
        opens="ftcore_data.images:opens",
    )


def check(row: Row) -> str | None:
    """Images, and a conversation with a place for each of them or for none."""
    column, talk = first(row, IMAGES), first(row, TALKS)
    if column is None or talk is None:
        return missing_all(row, IMAGES if column is None else TALKS)
    if reason := unused(row, "audio", "audios", "video", "videos", "tools") or check_system(row, row[talk]):
        return reason
    images = _images(row)
    if not images or (strange := next((i for i in images if not _is_image(i)), None)) is not None:
        what = kind(strange) if images else "empty"
        return f"column '{column}' is {what}, not an image\ngive the path of an image, or a list of paths"
    turns = row[talk]
    if talk == "conversations" and _of_sharegpt(turns):
        if reason := sharegpt.check_turns(turns):
            return reason
        turns = sharegpt.to_messages(turns)
    if reason := check_messages(turns, talk, media=True):
        return reason
    places = sum(_places(turns))
    if places not in (0, len(images)):
        return f"has {len(images)} images and {places} places for them\nput one {HERE} for each image, or none at all"
    if not places and all(turn["role"] != "user" for turn in turns):
        return f"has images, but no message of the user's to put them in\nput one {HERE} for each image"
    return None


def convert(row: Row) -> dict[str, Any]:
    """Contents become parts of type `image` and `text`, in the order in which the words have them."""
    talk, images = first(row, TALKS), _images(row)
    assert talk is not None
    turns = row[talk]
    messages = with_system(sharegpt.to_messages(turns) if _of_sharegpt(turns) else plain_messages(turns), row)
    everywhere = sum(_places(messages)) > 0
    made, put = [], everywhere
    for message in messages:
        parts = _parts(message.get("content"))
        if not put and message["role"] == "user":
            parts, put = [{"type": "image"} for _ in images] + parts, True
        made.append({**message, "content": parts})
    return {"images": images, "messages": made}


def _images(row: Row) -> list[Any]:
    column = first(row, IMAGES)
    value = row[column] if column else None
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _is_image(value: Any) -> bool:
    """A path, bytes, both as `datasets` keeps them, or what has PIL's size and mode."""
    if isinstance(value, dict):
        return bool(value.get("bytes") or value.get("path"))
    return bool(value) and (isinstance(value, (str, bytes)) or (hasattr(value, "size") and hasattr(value, "mode")))


def _of_sharegpt(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _places(messages: list[Message]) -> Iterator[int]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content.count(HERE)
        else:
            yield sum(part.get("type") == "image" or str(part.get("text")).count(HERE) for part in content or ())


def _parts(content: Any) -> list[Message]:
    if isinstance(content, str):
        made: list[Message] = []
        for number, words in enumerate(content.split(HERE)):
            made += [{"type": "image"}] if number else []
            text = words.strip("\n") if HERE in content else words
            made += [{"type": "text", "text": text}] if text else []
        return made
    # A place for an image says nothing else: the images are those of the column, whatever a part names.
    filled = ({key: value for key, value in part.items() if value is not None} for part in content or ())
    parts = [{"type": "image"} if part.get("type") == "image" else part for part in filled]
    return [piece for part in parts for piece in (_parts(part["text"]) if part.get("type") == "text" else [part])]


def opens(source: Path | bytes) -> str | None:
    """Why a file is no image, with the fix in a second line; None when it is one.

    :param source: path or bytes.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.verify()
    except PIL.Image.DecompressionBombError as error:
        return f"{'an image' if isinstance(source, bytes) else source} is too large ({error})\ngive a smaller one"
    except (OSError, SyntaxError, ValueError) as error:  # what PIL's readers raise for damaged files
        name = "its bytes" if isinstance(source, bytes) else str(source)
        reason = "are no image" if isinstance(source, bytes) else "is no image"
        detail = "" if isinstance(error, PIL.UnidentifiedImageError) else f" that can be read ({error})"
        return f"{name} {reason}{detail}\ngive a PNG, JPEG, WebP or other file that Pillow reads"
    return None
