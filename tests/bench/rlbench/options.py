"""The command line of `preference_step.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stepbench.options import MEMORIES

from rlbench.sides import SIDES
from rlbench.works import TRAINERS, TrainerWork

TINY = {"shape": "tiny", "rows": 4, "length": 320, "prompt": 256, "warmup": 1, "steps": 2}
"""What `--tiny` sets."""


def arguments(words: Sequence[str], about: str | None) -> argparse.Namespace:
    """What was written wins over `--tiny`."""
    parser = _parser(about)
    if parser.parse_args(words).tiny:
        parser.set_defaults(**TINY)
    found = parser.parse_args(words)
    for name, known in (("trainers", TRAINERS), ("sides", SIDES), ("memory", MEMORIES)):
        given = getattr(found, name).split(",")
        if strange := [one for one in given if one.partition("@")[0] not in known]:
            parser.error(f"--{name} takes {', '.join(known)}, not '{strange[0]}'")
    if found.rows < 2 or found.rows % 2:
        parser.error(f"--rows takes an even number from 2, not {found.rows}: a pair is two rows")
    return found


def work(found: argparse.Namespace, trainer: str) -> TrainerWork:
    """A trainer's step."""
    shared = {name: getattr(found, name) for name in TrainerWork.__dataclass_fields__ if hasattr(found, name)}
    rows = 2 * found.pairs if trainer == "dpo" and found.pairs else found.rows
    fixed = {"quantizer": "none", "recompute": True, "optimizer": "adamw"}
    return TrainerWork(**{**shared, **fixed, "rows": rows, "trainer": trainer, "memory": "", "shared": False})


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", default=",".join(TRAINERS))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument(
        "--memory",
        default="least,auto@0.6x,auto",
        help="ftcore's, several with commas; auto@20: within that many GiB, auto@0.6x: weights and 0.6 of TRL's rest",
    )
    parser.add_argument("--family", default="llama")
    parser.add_argument("--shape", default="llama3.2-1b")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step; completions of GRPO's prompt")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of DPO's step; half of --rows if not given")
    parser.add_argument("--length", type=int, default=4096, help="tokens of every sequence")
    parser.add_argument("--prompt", type=int, default=512, help="of them in the prompt, the template's included")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=150, help="seconds for each side of each trainer")
    parser.add_argument("--shared", action="store_true", help="ftcore's GRPO also with prompts that are read once")
    parser.add_argument("--ahead", action="store_true", help="let all sides import their packages at once, in advance")
    parser.add_argument("--profile", action="store_true", help="the kernels of one more pass forward and backward")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the family's tiny model and few tokens")
    parser.add_argument("--folder", default="", help="checkpoint folder; none makes one of random weights")
    return parser
