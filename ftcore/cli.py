"""The command line: `ftcore TASK key=value ...`. Help is answered from metadata alone, in well under half a second."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile

TASKS = {
    "train": "train, evaluate and export (the default)",
    "plan": "show what would run, without reading a weight",
    "preview": "show rows as the model sees them, trained tokens marked",
    "chat": "talk to a trained model: ftcore chat run=RUN",
    "eval": "measure held-out rows before and after training: ftcore eval run=RUN",
    "reward": "show what rewards say to completions in a file, without a model",
    "export": "export a trained run: ftcore export run=RUN +export=[safetensors]",
    "plugins": "list plugins, or describe one: ftcore plugins model/qwen3",
    "runs": "list the runs",
    "new": "write a plugin package to start from: ftcore new export/NAME",
}
PLAIN = frozenset({"plugins", "runs", "new"})
"""Tasks that never enter Hydra."""


def main(argv: Sequence[str] | None = None) -> None:
    """Console entry point; exits with the codes of :class:`ftcore.errors.Exit`."""
    from ftcore.redaction import guard_streams

    guard_streams()
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # once more, while the first one was being answered
        code = 75
    if code == 75:
        from ftcore.signals import ignore

        ignore()  # another one, while Python shuts down, does not change the exit status
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    from ftcore.errors import Exit, FtcoreError
    from ftcore.noise import quiet
    from ftcore.signals import interrupting

    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            from ftcore.tasks.help import show_help

            show_help(TASKS)
            return 0
        if argv[0] in ("-V", "--version"):
            from ftcore import __version__

            print(f"ftcore {__version__}")
            return 0
        task, rest = split_task(argv)
        if task not in PLAIN and {"-h", "--help"} & {*rest}:
            from ftcore.tasks.help import show_help

            show_help(TASKS)
            return 0
        module = importlib.import_module(f"ftcore.tasks.{task}")
        quiet()
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra re-raises, and the message is ours
        with interrupting() if task == "train" else nullcontext():
            code = module.main(rest)
    except FtcoreError as error:
        print(f"ftcore: {short(str(error))}", file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        print("\nftcore: stopped", file=sys.stderr)
        return int(Exit.PREEMPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, as `head` does
        return 0
    except OSError as error:
        print(f"ftcore: {error}\n    fix: look at the disk and at your rights there", file=sys.stderr)
        return int(Exit.IO)
    except Exception as error:
        from ftcore.disk import shortage

        if (said := shortage(error)) is None:
            raise
        print(f"ftcore: nothing more can be written: {said}\n    fix: free some space", file=sys.stderr)
        return int(Exit.IO)
    return int(code or 0)


WIDEST = 1000
"""Characters of a line of a message; names in a file of somebody's may be longer."""


def short(message: str, lines: int = 12) -> str:
    """A message that fits: what a plugin's own error says may be long."""
    text = [line if len(line) <= WIDEST else f"{line[:WIDEST]} ..." for line in message.splitlines()]
    more = [f"... {len(text) - lines + 1} more lines"] if len(text) > lines else []
    return "\n".join([*text[: lines - 1], *more] if more else text)


def split_task(argv: list[str]) -> tuple[str, list[str]]:
    """The task is the first word that starts with a letter and has no `=`; without one it is `train`.

    Raises Refused for a word that is no task.
    """
    from ftcore.errors import Problem, Refused

    value_of_flag = False
    for index, word in enumerate(argv):
        if word[:1].isalpha() and "=" not in word and not value_of_flag:
            if word not in TASKS:
                raise Refused(Problem(word, "is neither a task nor key=value", _meant(argv, index)))
            return word, argv[:index] + argv[index + 1 :]
        value_of_flag = word in (
            "--config-dir",
            "-cd",
            "--cfg",
            "-c",
            "--package",
            "-p",
            "--info",
            "-i",
            "--config-name",
            "-cn",
        )
    return "train", argv


def _meant(argv: list[str], index: int) -> str:
    """The fix for a word that is no task: a task, a key without its value, or the rest of a value with spaces."""
    from ftcore.catalog import nearest
    from ftcore.config import KINDS
    from ftcore.explanations import quoted
    from ftcore.overrides import RUN_KEYS

    word, before = argv[index], argv[index - 1] if index else ""
    if before.endswith("=") and (key := argv[index - 2] if before == "=" and index > 1 else before[:-1]):
        return f"write {key}={word}, without spaces"
    if word.partition(".")[0] in RUN_KEYS:
        plus = "+" if word in KINDS else ""
        return f"write {plus}{word}=VALUE, without spaces"
    if near := nearest(word, TASKS):
        return f"did you mean `ftcore {near}`?"
    if "=" in before:
        rest = takewhile(lambda word: "=" not in word and word[:1] not in "+-", argv[index:])
        key, _, value = " ".join([before, *rest]).partition("=")
        return f"quote a value that has spaces: {quoted(key, value)}"
    return f"tasks: {', '.join(TASKS)}"
