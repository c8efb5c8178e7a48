"""safetensors files, read and written a few rows at a time.

The `safetensors` package maps whole files into memory or takes whole tensors; a merge of a large model has room for
neither. The format: eight bytes with the header's length, the header as JSON, the values without gaps
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.paths import safe_join
from ftcore.weights import Weight

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    names = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
    kinds = (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
    return dict(zip(names, kinds, strict=True))


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers checkpoint folder, by its index where it has one; empty without any.

    Raises Refused when the index names a file that is not there, or one outside the folder.
    """
    if (folder / INDEX).is_file():
        files = indexed_files(folder / INDEX)
        if missing := [f.name for f in files if not f.is_file()]:
            problem = f"{INDEX} names {missing[0]}, which is not there"
            raise Refused(Problem(str(folder), problem, "get the checkpoint again", Exit.MISSING_INPUT))
        return files
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of weights names, each in its own folder; whether they are there is not looked at.

    Raises Refused for an index that is damaged, or that names anything else.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        wanted = sorted(set(names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"is damaged, or no index of weights: {type(error).__name__}: {error}"
        raise Refused(Problem(str(index), problem[:200], "get the checkpoint again", Exit.DATA)) from error
    files = []
    for name in wanted:
        try:
            if not isinstance(name, str) or "/" in name:
                raise ValueError("it is not in the folder itself")
            files.append(safe_join(index.parent, name, follow=True))  # the hub's cache is made of links
        except ValueError as error:
            problem = f"{index.name} names {str(name)[:80]!r}, which is not the name of a file in that folder: {error}"
            raise Refused(Problem(str(index.parent), problem, "do not use this checkpoint", Exit.DATA)) from error
    return files


def read_weights(file: Path) -> dict[str, Weight]:
    """Names to weights that read their rows from `file`; only the header is read here.

    Raises Refused for a file that is no safetensors file or is cut off.
    """
    dtypes = _dtypes()
    header, start = _header(file)
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in dtypes:
            problem = f"{name} has the type {entry['dtype']}, which ftcore does not read"
            raise Refused(Problem(str(file), problem, "convert the checkpoint to 16 bits", Exit.DATA))
        shape, dtype = tuple(entry["shape"]), dtypes[entry["dtype"]]
        first, last = entry["data_offsets"]
        if last - first != dtype.itemsize * math.prod(shape):
            problem = f"is damaged: {name} has {last - first} bytes, which is not its shape's size"
            raise Refused(Problem(str(file), problem, "get the checkpoint again", Exit.DATA))
        weights[name] = Weight(shape, dtype, _reader(file, start + entry["data_offsets"][0], shape, dtype))
    return weights


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the values start."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        end = max((_checked_entry(name, e) for name, e in header.items() if name != "__metadata__"), default=0)
        if file.stat().st_size < 8 + length + end:
            raise ValueError(f"{8 + length + end - file.stat().st_size} bytes are missing at its end")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"is damaged or no safetensors file: {error}"
        raise Refused(Problem(str(file), problem, "get the checkpoint again", Exit.DATA)) from error
    return header, 8 + length


def _checked_entry(name: str, entry: Any) -> int:
    """Where the values of a tensor end. Raises ValueError, KeyError or TypeError for an entry that is none."""
    first, last = entry["data_offsets"]
    numbers = [first, last, *entry["shape"]]
    if not isinstance(entry["dtype"], str) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"the entry of {name[:80]} is none")
    if last < first:
        raise ValueError(f"{name[:80]} ends before it begins")
    return int(last)


def _reader(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
    def read(start: int, stop: int) -> torch.Tensor:
        import torch

        rows = (stop - start, *shape[1:]) if shape else ()
        width = dtype.itemsize * math.prod(shape[1:])
        buffer = bytearray(width * (stop - start))
        if not buffer:
            return torch.empty(rows, dtype=dtype)
        with file.open("rb") as handle:
            handle.seek(offset + start * width)
            handle.readinto(buffer)
        return torch.frombuffer(buffer, dtype=dtype).view(rows)

    return read


Entry = tuple[str, tuple[int, ...], "torch.dtype", Callable[[], Iterable["torch.Tensor"]]]
"""Name, shape and type of a tensor, and what gives its rows in order."""


def write_file(file: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file; of the values, only one chunk of rows is in memory at a time.

    Chunks are converted to the entry's type as they come. Raises ValueError when they are not as many as its shape.
    """
    names = {dtype: name for name, dtype in _dtypes().items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, shape, dtype, _ in entries:
        size = dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name, _, dtype, chunks in entries:
            first, last = header[name]["data_offsets"]
            before = handle.tell()
            for piece in raw_bytes(chunks(), dtype):
                handle.write(piece)
            if handle.tell() - before != last - first:
                raise ValueError(f"{name}: {handle.tell() - before} bytes came, not {last - first}")


def raw_bytes(chunks: Iterable[torch.Tensor], dtype: torch.dtype) -> Iterator[bytes | memoryview]:
    """The chunks in `dtype`, as they lie in memory."""
    import torch

    for chunk in chunks:
        yield chunk.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_checkpoint(folder: Path, entries: Sequence[Entry], shard_size: int) -> None:
    """`model.safetensors`, or shards of at most `shard_size` bytes with their index, as transformers names them.

    A tensor that is larger than a shard has one of its own.
    """
    shards: list[list[Entry]] = [[]]
    room, total = shard_size, 0
    for entry in entries:
        size = entry[2].itemsize * math.prod(entry[1])
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(entry)
        room -= size
        total += size
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        places |= {entry[0]: name for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
