"""Prints the longest files and functions of the code: short ones are a habit here, not a rule."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Five of each."""
    files, functions = [], []
    for root in ("ftcore", "plugins", "kernels", "conf"):
        for file in (ROOT / root).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            files.append((text.count("\n"), str(file.relative_to(ROOT))))
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    functions.append(
                        ((node.end_lineno or 0) - node.lineno + 1, f"{file.relative_to(ROOT)}:{node.name}")
                    )
    for length, name in sorted(files, reverse=True)[:5] + sorted(functions, reverse=True)[:5]:
        print(f"  {length:4} {name}")


if __name__ == "__main__":
    main()
