"""Markdown pages and their fenced blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block; its info string is a language and `key="value"` options, which test_snippets.py explains."""

    page: Path
    line: int
    language: str
    options: dict[str, str]
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The page's fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        options = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.M)
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, options, body))
    return found
