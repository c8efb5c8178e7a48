"""A layout in the template language of Go, as Ollama runs it.

Variables and functions are those of Ollama's documentation (`docs/template.mdx` of ollama/ollama: `.Messages` with
`.Role` and `.Content`, "range over messages"); `.Thinking`, `.Think` and `.IsThinkSet` are in `template/template.go`
there. Ollama's templates know no function that strips white space, and `.Messages` holds the system messages too.
"""

from __future__ import annotations

from ftcore_exporters._ollama.layouts import Layout, Place, Turn


def go_template(layout: Layout, begin: str = "") -> str:
    """Go template that writes what `layout.render` writes, after `begin`.

    No action trims white space of the layout's own: text is always followed by an action without `-`, and the line
    breaks that separate actions are taken away by the `{{-` after them.
    """
    into_question = layout.place is not Place.turn
    lines = ['{{ $before := "" }}'] if into_question else []
    lines += [_text(begin) + "{{ range $i, $_ := .Messages }}"]
    if begin and into_question:
        lines = [_text(begin) + lines[0], "{{ range $i, $_ := .Messages }}"]
    lines += ["{{ $last := eq (len (slice $.Messages $i)) 1 }}"]
    if layout.default is not None:
        said = _text(layout.system[0] + layout.default + layout.system[1])
        lines += ['{{ if and (eq $i 0) (ne .Role "system") }}' + said + "{{ end }}"]
    lines += [_turns(layout)]
    if layout.ask or layout.quiet:
        quiet = "{{ if and $.IsThinkSet (not $.Think) }}" + _text(layout.quiet) + "{{ end }}" if layout.quiet else ""
        lines += ['{{ if and $last (ne .Role "assistant") }}' + _text(layout.ask) + quiet + "{{ end }}"]
    lines += ["{{ end }}"]
    return "\n".join([lines[0], *("{{-" + line.removeprefix("{{") for line in lines[1:])])


def _turns(layout: Layout) -> str:
    """One message: what its role asks for."""
    user, assistant, system = layout.user, layout.assistant, _around(layout.system, "{{ .Content }}")
    if layout.place is not Place.turn:
        system = "{{ $before = print " + f"{_string(layout.system[0])} .Content {_string(layout.system[1])}" + " }}"
    if layout.drops_empty:
        system = "{{ if .Content }}" + system + "{{ end }}"
    before = {Place.turn: "", Place.first: "{{ $before }}", Place.last: "{{ if $last }}{{ $before }}{{ end }}"}
    forget = '{{ $before = "" }}' if layout.place is Place.first else ""
    thoughts = ""
    if layout.thinking:
        # In a branch of their own always: Ollama takes its first and last text for the marks of thinking.
        test = "true" if layout.keeps_thoughts else "$last"
        test = test if layout.empty_thoughts else ".Thinking" if layout.keeps_thoughts else "and $last .Thinking"
        thoughts = "{{ if " + test + " }}" + _around(layout.thinking, "{{ .Thinking }}") + "{{ end }}"
    ends = "{{ if not $last }}" + _text(assistant[1]) + "{{ end }}" if assistant[1] else ""
    return (
        '{{ if eq .Role "system" }}'
        + system
        + '{{ else if eq .Role "user" }}'
        + _text(user[0])
        + before[layout.place]
        + "{{ .Content }}"
        + _text(user[1])
        + forget
        + '{{ else if eq .Role "assistant" }}'
        + _text(assistant[0])
        + thoughts
        + "{{ .Content }}"
        + ends
        + "{{ end }}"
    )


def _around(turn: Turn, action: str) -> str:
    return _text(turn[0]) + action + _text(turn[1])


def _text(literal: str) -> str:
    """Text as it stands; an action's opening braces in it are written by an action."""
    return literal.replace("{{", '{{ "{{" }}')


def _string(literal: str) -> str:
    """A string constant of Go."""
    return '"' + literal.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
