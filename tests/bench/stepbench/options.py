"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from stepbench.works import ALL, ROWS, TINY, Work

MEMORIES = ("off", "auto", "least", "offload")


def arguments(
    words: Sequence[str], about: str | None, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """The row's options, then `--tiny`'s, and what was written on the command line over both.

    :param add: Adds a script's own options.
    """
    parser = _parser(about)
    add(parser)
    first = parser.parse_args(words)
    parser.set_defaults(**ROWS.get(first.row, {}), **({} if first.row else {"sides": "hf,ftcore"}))
    if first.tiny:
        parser.set_defaults(**TINY)
    found = parser.parse_args(words)
    if strange := [m for m in found.memory.split(",") if m.partition("@")[0] not in MEMORIES]:
        parser.error(f"--memory takes {', '.join(MEMORIES)}, not '{strange[0]}'")
    return found


def works(found: argparse.Namespace) -> dict[str, Work]:
    """One job for each of ftcore's memory settings, by its name; peers take the first."""
    recompute = "off" not in found.memory.split(",")
    shared = {name: getattr(found, name) for name in Work.__dataclass_fields__ if hasattr(found, name)}
    return {m: Work(**{**shared, "memory": m, "recompute": recompute}) for m in found.memory.split(",")}


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS, help="a row by name; none for the options below alone")
    parser.add_argument("--sides", default=ALL)
    parser.add_argument("--peers", default="", metavar="SHELL", help="run before liger and unsloth, to find them")
    parser.add_argument("--family", default="llama")
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16, help="0 trains all weights")
    parser.add_argument(
        "--memory",
        default="least",
        help="ftcore's, or several with commas; off: peers as well; auto@19.4: within that many GiB",
    )
    parser.add_argument("--quantizer", default="none")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--images", type=int, default=0, help="of a row, for families in Qwen-VL's layout")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each side")
    parser.add_argument("--ahead", action="store_true", help="let all sides import their packages at once, in advance")
    parser.add_argument("--profile", action="store_true", help="one more step of ftcore under torch.profiler")
    parser.add_argument("--known", default="", metavar="FILE", help="results of the row, for sides that are not run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny model and few tokens")
    parser.add_argument("--folder", default="", help="checkpoint folder; none makes one of random weights")
    return parser
