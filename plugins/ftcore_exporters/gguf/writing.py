"""A GGUF file written chunk by chunk: header and keys by `gguf.GGUFWriter`, tensors as they are read."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from ftcore_exporters.gguf.blocks import packed
from ftcore_exporters.gguf.mixes import size
from ftcore_exporters.gguf.tensors import Tensor
from ftcore_exporters.gguf.workers import Quantizers


def write(writer: GGUFWriter, tensors: Sequence[Tensor], types: Mapping[str, Type], path: Path) -> None:
    """Write the file: the writer's keys, then every tensor in its type.

    At no time are more than a few chunks of some 16 MiB in memory. Raises Refused for values that a type cannot hold.
    """
    import numpy

    stored = numpy.dtype(numpy.float32)  # gguf takes the shape as that of values, not of bytes
    for tensor in tensors:
        kind = types[tensor.name]
        writer.add_tensor_info(tensor.name, tensor.shape, stored, size(kind, tensor.shape), kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        with Quantizers() as quantizers:
            for tensor in tensors:
                kind, written = types[tensor.name], 0
                for rows in tensor.chunks():
                    written += sum(map(out.write, packed(rows, kind, tensor.name, quantizers)))
                assert written == size(kind, tensor.shape), tensor.name
                writer.write_padding(out, written)
                _return_memory()
    finally:
        writer.close()


def _return_memory() -> None:
    """Give freed chunks back to the system: small tensors that stay between them would make glibc keep them all."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)
