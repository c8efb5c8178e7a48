"""What no setting may hold, wherever it is written: a secret, a look into the environment, the name of code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, refuse
from ftcore.redaction import is_secret, redact

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CODE = frozenset({"_target_", "_args_", "_partial_", "_convert_", "_recursive_", "()", "class"})
"""Keys by which Hydra and Python's logging name code."""
VARIABLES = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|TMPDIR|SCRATCH|WORK|PROJECT|(?:LOCAL_)?RANK|WORLD_SIZE"
    r"|(?:SLURM|FTCORE)_(?!\w*(?:TOKEN|KEY|SECRET|PASSWORD))\w+"
)
"""Environment variables that `${oc.env:NAME}` may read: folders, jobs, processes, and a user's own, `FTCORE_...`."""
HYDRAS = re.compile(r"hydra(?:[./](?:sweeper|launcher|sweep|run)(?:\.(?!.*hydra).*)?|\.(?:mode|verbose|job\.name))")
"""Keys of Hydra's own that the command line may set."""
_OPENS = re.compile(r"\$\{\s*([^${}:]*)([:}$]?)([^${},]*)")


def check_words(words: Sequence[str]) -> None:
    """Raises Refused where a `key=value` word of the command line holds a secret, before anything repeats it."""
    refuse([secret(name) for name, value in map(_halves, words) if is_secret(name, value)])


def check_overrides(parsed: Sequence[Override]) -> None:
    """Raises Refused where the command line names code, or sets what of Hydra's could run some."""
    problems = []
    for override in parsed:
        key = str(override.key_or_group)
        value = {} if override.is_sweep_override() else override.value()
        named = CODE & {*key.split("."), *_keys(value)}
        if named:
            problems.append(code(key, min(named)))
        elif re.split(r"[./]", key)[0] == "hydra" and not HYDRAS.fullmatch(key):
            message = "is Hydra's own, and could run code or read other files"
            problems.append(Problem(key, message, "leave it out; --config-dir FOLDER adds YAML of your own"))
    refuse(problems)


def check_values(config: Any) -> None:
    """Raises Refused where a composed config, not yet resolved, holds what none may; all findings at once."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    refuse(list(_walk(plain, "")))


def _walk(node: Any, path: str) -> Iterator[Problem]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key in CODE:
                yield code(path, str(key))
            yield from _walk(value, here)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value, path)
    elif isinstance(node, str):
        if is_secret(path, node):
            yield secret(path)
        elif found := lookup(node):
            yield environment(path, found)


def lookup(text: str) -> str | None:
    """The first `${...}` in a text that reads more of the environment than it may, or could turn out to."""
    for opens in _OPENS.finditer(text):
        name, ends, variable = opens[1].strip(), opens[2], opens[3].strip()
        # `${${a}:NAME}` is a resolver whose name comes from elsewhere.
        hidden = ends == "$" or (ends == ":" and name == "oc.env" and not VARIABLES.fullmatch(variable))
        if hidden or (ends == ":" and name in ("oc.decode", "oc.create", "oc.deprecated")):
            return opens[0].strip()
    return None


def secret(key: str) -> Problem:
    """The refusal of a secret, without it."""
    fix = "take it out and give it by the environment, as in `HF_TOKEN=... ftcore ...`, or log in with `hf auth login`"
    message = "holds a password or an access token, which would be written into the run's files"
    return Problem(redact(key), message, fix)


def code(key: str, name: str) -> Problem:
    """The refusal of a setting that names code."""
    message = f"holds `{name}`, by which a config names code to run"
    return Problem(key or name, message, "take it out; plugins=[file.py] and rewards=[file.py:function] bring code")


def environment(key: str, found: str) -> Problem:
    """The refusal of a look into the environment."""
    message = f"reads `{found}`, which could write a secret of the environment into the run's files"
    return Problem(
        key, message, "write the value itself; ${oc.env:NAME} may read HOME, USER, SCRATCH, TMPDIR, SLURM_*, FTCORE_*"
    )


def _keys(value: Any) -> Iterator[str]:
    """Keys at any depth."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(item)
    if isinstance(value, dict):
        yield from (part for key in value for part in str(key).split("."))


def _halves(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key.lstrip("+~"), value.strip("'\"")
