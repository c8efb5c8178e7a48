"""YAML that ftcore did not ship cannot tell Hydra's own application what to run.

Hydra makes objects and log handlers of what stands under `hydra`, by the name of any function: a recipe of somebody
else's could so copy or delete files. Their runs' settings are data, and stay open to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ftcore.catalog import installed
from ftcore.config import KINDS
from ftcore.config_guard import CODE, environment, lookup, secret
from ftcore.errors import Exit, Problem, refuse
from ftcore.redaction import FORMS

OWN = "ftcore_conf"
OPEN = frozenset({"run.dir", "sweep.dir", "sweep.subdir"})
"""Keys under `hydra` that such a file may set: names of folders."""
SWEEPER = frozenset({"direction", "n_trials", "n_jobs", "max_batch_size", "study_name"})
"""Keys under `hydra.sweeper` that are numbers and names."""
SELECTED = ("hydra/sweeper", "hydra/launcher")
"""What a defaults list may select, by name, of what is installed."""
FILES = ("plugins", "rewards")
"""Keys that name Python files: a package brings its code by entry points, where `ftcore plugins` shows it."""
OTHER_GROUPS = ("recipe", "sweep", "hydra")
"""Folders of a search path besides the kinds of options."""
MOST = 10_000
"""Keys in one file; aliases of aliases would make billions of them."""


def check(config_dir: str | None) -> None:
    """Look through the YAML of `--config-dir` and of other packages.

    Raises Refused for a file that sets what only ftcore and the command line may.
    """
    packages: list[Path] = []
    for package in installed().conf.values():
        spec = find_spec(package) if package != OWN else None
        packages += [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    own = [Path(config_dir)] if config_dir else []
    refuse([*_in(own, open_files=True), *_in(packages, open_files=False)])


def _in(folders: list[Path], open_files: bool) -> Iterator[Problem]:
    for folder in folders:
        yield from _below(folder, open_files)


def _below(folder: Path, open_files: bool) -> Iterator[Problem]:
    """What can be selected: the folder's own files, those of ftcore's groups, and of groups that these name.

    Records of runs and of sweeps lie below a working directory as well, and nobody can select those.
    """
    there = {part.name for part in folder.iterdir() if part.is_dir()} if folder.is_dir() else set()
    waiting, seen = ["", *sorted(there & {*KINDS, *OTHER_GROUPS})], set[Path]()
    for group in waiting:  # grows
        files = folder.glob("*.y*ml") if not group else (folder / group).rglob("*.y*ml")
        for file in sorted(set(files) - seen):
            seen.add(file)
            waiting += [name for name in sorted(_groups(file, there)) if name not in waiting]
            yield from _of(file, folder, open_files)


def _groups(file: Path, there: set[str]) -> set[str]:
    """Those of the folders that the file's defaults list names; all, where it does not name them plainly."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return set()  # told of as a file that cannot be read
    defaults = content.get("defaults") if isinstance(content, Mapping) else None
    found: set[str] = set()
    for entry in defaults if isinstance(defaults, list) else []:
        for name in islice(_words(entry), MOST):
            parts = name.replace("override ", "").replace("optional ", "").strip(" /").partition("@")[0].split("/")
            if "$" in name or {"", ".", ".."} & set(parts):
                return there
            found.add(parts[0].casefold())  # some file systems do not tell letters' cases apart
    return {name for name in there if name.casefold() in found}


def _of(file: Path, folder: Path, open_files: bool) -> Iterator[Problem]:
    if file.relative_to(folder).parts[0] == "hydra":
        yield _problem(file, "lies in a folder named hydra")
        return
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problem = f"cannot be read: {' '.join(str(error).split())[:160]}"
        yield Problem(str(file), problem, "mend the file, or take it out", Exit.DATA)
        return
    if FORMS.search(text):
        yield secret(str(file))
    elif found := next(filter(None, map(lookup, islice(_words(content), MOST))), None):
        yield environment(str(file), found)
    elif header := next((line for line in text.splitlines() if "@package" in line and "hydra" in line), None):
        yield _problem(file, f"is put under hydra: {header.strip()}")
    elif isinstance(content, Mapping):
        yield from _selected(file, content.get("defaults") or [])
        yield from _set(file, content, open_files)


def _selected(file: Path, defaults: Any) -> Iterator[Problem]:
    """What the defaults list selects that it may not."""
    if not isinstance(defaults, list):
        yield Problem(str(file), "has a defaults list that is no list", "mend the file", Exit.DATA)
        return
    for entry in defaults:
        for name in entry if isinstance(entry, Mapping) else [entry]:
            plain = str(name).replace("override ", "").replace("optional ", "").strip(" /").partition("@")
            if "hydra" in str(name) and (plain[0] not in SELECTED or plain[1]):
                yield _problem(file, f"selects {name}")


def _set(file: Path, content: Mapping[Any, Any], open_files: bool) -> Iterator[Problem]:
    """Which keys the file sets that it may not."""
    keys = set(islice(_flat(content), MOST + 1))
    if len(keys) > MOST:
        yield Problem(str(file), f"has more than {MOST} keys", "take it out", Exit.DATA)
        return
    for key in sorted(keys):
        if not _open(key) or (not open_files and key.partition(".")[0] in FILES):
            yield _problem(file, f"sets {key}")


def _flat(node: Any, path: str = "") -> Iterator[str]:
    """All keys with dots; of an empty node, its own."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        yield path
        for value in node:
            if isinstance(value, Mapping):
                yield from _flat(value, path)
    else:
        yield path


def _words(node: Any) -> Iterator[str]:
    """All keys and values that are text."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(node, list):
        for value in node:
            yield from _words(value)
    elif isinstance(node, str):
        yield node


def _open(key: str) -> bool:
    parts = key.split(".")
    if CODE & set(parts):
        return False
    if not parts[0].startswith("hydra"):
        return True
    rest = ".".join(parts[1:])
    if rest.startswith("sweeper.params."):
        return not rest.removeprefix("sweeper.params.").lstrip("+~").startswith("hydra")
    return rest in OPEN or rest.removeprefix("sweeper.") in SWEEPER


def _problem(file: Path, what: str) -> Problem:
    fix = "write Hydra's own settings on the command line, or take the file out"
    return Problem(str(file), f"{what}, which only ftcore and the command line may", fix)
