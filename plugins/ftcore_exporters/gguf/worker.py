"""A process that packs rows into blocks: it reads them from its input and writes the blocks to its output.

`libgguf` holds Python's lock while it works, so more cores take more processes. Run as a script by `workers`.
"""

from __future__ import annotations

import struct
import sys

HEAD = struct.Struct("<iqq")
"""Type, rows, row size; the rows follow in float32."""


def main() -> None:
    """Until the input ends."""
    import libgguf  # type: ignore[import-untyped]
    import numpy

    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(HEAD.size)) == HEAD.size:
        kind, rows, width = HEAD.unpack(head)
        values = numpy.frombuffer(source.read(rows * width * 4), dtype=numpy.float32).reshape(rows, width)
        target.write(libgguf.quantize_rows(values, kind).data)
        target.flush()


if __name__ == "__main__":
    main()
