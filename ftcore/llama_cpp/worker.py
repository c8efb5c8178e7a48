"""`python -m ftcore.llama_cpp.worker`: llama.cpp behind two pipes, so that its crash ends this process alone.

A request is one line of JSON on standard input: the arguments of `Model` first, then `{"call": name, ...}`. The answer
is one line of JSON: `{"value": ...}`, `{"bytes": n}` with n raw bytes behind it, or `{"error": reason}`. End of input
ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

from ftcore.llama_cpp import library
from ftcore.llama_cpp.model import Failed, Model


def main() -> int:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints cannot get between the answers
    requests = sys.stdin.buffer
    try:
        model = _open(json.loads(requests.readline() or "{}"))
    except (Failed, library.OtherBuild, OSError) as error:
        _send(answers, {"error": str(error)})
        return 1
    _send(answers, {"value": model.facts()})
    for line in requests:
        request = json.loads(line)
        try:
            value = getattr(model, request.pop("call"))(**request)
        except Failed as error:
            _send(answers, {"error": str(error)})
            continue
        if isinstance(value, bytes):
            _send(answers, {"bytes": len(value)}, value)
        else:
            _send(answers, {"value": value})
    model.close()
    return 0


def _open(arguments: dict[str, Any]) -> Model:
    file = library.find()
    if file is None:
        raise Failed("llama.cpp is not installed")
    return Model(library.load(file), **arguments)


def _send(answers: BinaryIO, head: dict[str, Any], data: bytes = b"") -> None:
    answers.write(json.dumps(head).encode() + b"\n" + data)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
