"""The Modelfile's grammar: instructions with values that Ollama reads back as they were given.

After `docs/modelfile.mdx` and `parser/parser.go` of ollama/ollama. Values have no escapes: one in quotation marks, or
in three of them, ends with the first line that ends with these marks. What Go does not take for printable, line breaks
and tabs aside, is dropped by the parser without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MARKS = '"""'
BREAKS = "\n\r"


def unwritable(text: str) -> str | None:
    """Why a Modelfile cannot hold the text as a value, or None."""
    dropped = next((c for c in text if not c.isprintable() and c not in BREAKS and c != "\t"), None)
    if dropped is not None:
        return f"Ollama's parser drops the character U+{ord(dropped):04X}"
    breaks = (place for place, c in enumerate(text) if c in BREAKS)
    if any(_ended(MARKS + text[:place]) for place in breaks):
        return 'a line ends with """, which ends a value in a Modelfile'
    return None


def _ended(begun: str) -> bool:
    begun = begun.strip()
    return len(begun) >= 2 * len(MARKS) and begun.endswith(MARKS)


def quoted(text: str) -> str:
    """The value as it is written. Raises ValueError for one that is `unwritable`."""
    if reason := unwritable(text):
        raise ValueError(reason)
    plain = not any(c in text for c in BREAKS) and not text.startswith('"')
    return f'"{text}"' if plain else MARKS + text + MARKS


def modelfile(
    model: str,
    comments: Iterable[str] = (),
    template: str | None = None,
    system: str | None = None,
    parameters: Sequence[tuple[str, float | str]] = (),
    license: str | None = None,
) -> str:
    """Text of a Modelfile.

    :param model: file name of the GGUF beside it.
    :param parameters: names and values, `stop` as often as there are stop sequences.

    Raises ValueError for a value that is `unwritable`.
    """
    lines = [f"# {comment}" for comment in comments]
    lines.append(f"FROM ./{model}")
    if template is not None:
        # The template in three marks even where one would do: it reads better.
        quoted(template)
        lines.append(f"TEMPLATE {MARKS}{template}{MARKS}")
    if system is not None:
        lines.append(f"SYSTEM {quoted(system)}")
    for name, value in parameters:
        number = f"{value:g}" if isinstance(value, float) else str(value)
        lines.append(f"PARAMETER {name} {quoted(value) if isinstance(value, str) else number}")
    if license is not None:
        lines.append(f"LICENSE {quoted(license)}")
    return "\n".join(lines) + "\n"
