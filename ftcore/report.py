"""What a person sees: tables and notes, with rich on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence


def note(text: str) -> None:
    """One line of information."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Title of a section."""
    if sys.stdout.isatty():
        from rich import print as rich_print
        from rich.markup import escape

        rich_print(f"\n[bold]{escape(text)}[/bold]", flush=True)
    else:
        print(f"\n{text}", flush=True)


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Columns, aligned. The last column is wrapped to the terminal."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        rich_table = Table(*header, box=SIMPLE, show_header=bool(header), pad_edge=False)
        for row in cells:
            if not header and not rich_table.columns:
                for _ in row:
                    rich_table.add_column()
            rich_table.add_row(*map(escape, row))
        Console().print(rich_table)
        return
    lines = [list(header)] * bool(header) + cells
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines), default=0))]
    for line in lines:
        print(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip(), flush=True
        )


def paragraph(text: str, indent: str = "    ") -> None:
    """Text of a model or a person, wrapped and set in."""
    width = min(shutil.get_terminal_size().columns, 120)
    for line in text.splitlines() or [""]:
        print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent), flush=True)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
