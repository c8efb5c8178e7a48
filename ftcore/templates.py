"""Chat templates by name or file: ftcore's own, and those of the model makers that TRL brings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ftcore.catalog import nearest
from ftcore.errors import Exit, Problem, Refused

KEY = "data.template"
OWN = Path(__file__).parent / "chat_templates"


def names() -> list[str]:
    """Names that `data.template` takes besides files; nothing is imported."""
    return sorted({file.stem for folder in _folders() for file in folder.glob("*.jinja")})


def read(template: str) -> str:
    """The Jinja text of a template, by name or by file.

    Raises Refused for a name that is not known, a file that is not there, and text that is no Jinja template.
    """
    file = _file(template)
    try:
        text = file.read_text(encoding="utf-8-sig")  # a byte order mark would stand in every row
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(Problem(KEY, f"{file} cannot be read: {error}", "save it as UTF-8", Exit.DATA)) from error
    _parse(text, file)
    return text


def _folders() -> list[Path]:
    spec = find_spec("trl")
    places = (spec.submodule_search_locations or ()) if spec else ()
    return [OWN, *(Path(place) / "chat_templates" for place in places)]


def _file(template: str) -> Path:
    own = Path(template).expanduser()
    if own.suffix or len(own.parts) > 1:
        if own.is_file():
            return own
        from ftcore.rows import beside

        raise Refused(Problem(KEY, f"there is no file {template}", beside(own), Exit.MISSING_INPUT))
    for folder in _folders():
        if (file := folder / f"{template}.jinja").is_file():
            return file
    near = nearest(template, names())
    fix = f"did you mean data.template={near}?" if near else f"name a .jinja file, or one of {', '.join(names())}"
    raise Refused(Problem(KEY, f"there is no chat template '{template}'", fix))


def _parse(text: str, file: Path) -> None:
    from jinja2 import TemplateSyntaxError

    from ftcore.template_limits import TooMuch
    from ftcore.template_sandbox import compiled

    try:
        compiled(text)
    except TooMuch as error:
        raise Refused(Problem(str(file), str(error), "shorten it, or name another", Exit.DATA)) from error
    except TemplateSyntaxError as error:
        place = f"{file}:{error.lineno}"
        raise Refused(
            Problem(place, f"is no Jinja template: {error.message}", "mend the template", Exit.DATA)
        ) from error
