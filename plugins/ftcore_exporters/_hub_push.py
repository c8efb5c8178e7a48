"""One commit to a repository of the Hugging Face hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ftcore import Plan, Problem, Refused
from ftcore.errors import Exit
from ftcore_exporters._card import base_id

T = TypeVar("T")

TRIES = 3
WAIT = 1.0
"""Seconds before the second try; twice as many before the third."""
HTTP = ("httpx", "httpx2", "httpcore", "requests")
"""Libraries that huggingface_hub asks by."""
TEXTS = ("adapter_config.json", "SERVE.md")
"""Files that name the base checkpoint, which may be a folder of this machine."""


def push(plan: Plan, source: Path, card: str, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Commit all files of `source`, and `card` as README.md; returns the commit's address.

    Raises Refused when the hub cannot be reached, refuses, or has a public repository where a private one is wanted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="ftcore")
    _tried(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not _tried(repo_id, lambda: api.model_info(repo_id)).private:
        fix = "take another repository, or set export.hub.private=false"
        raise Refused(Problem("export.hub.private", f"{repo_id} is there and is public", fix))
    if revision is not None:
        _tried(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    added = [CommitOperationAdd(path, content) for path, content in _contents(plan, source) if path != "README.md"]
    added.append(CommitOperationAdd("README.md", card.encode()))
    done: Any = _tried(
        repo_id, lambda: api.create_commit(repo_id, operations=added, commit_message=message, revision=revision)
    )
    return str(done.commit_url)


def _contents(plan: Plan, source: Path) -> list[tuple[str, Path | bytes]]:
    """Paths in the repository to files, or to what is sent in their place."""
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())
    root = source.parent if source.is_file() else source
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    return [(file.relative_to(root).as_posix(), _portable(plan, file)) for file in shown]


def _portable(plan: Plan, file: Path) -> Path | bytes:
    """The file, or its text with the base's id in the place of a folder of this machine."""
    from ftcore import checkpoint

    model = plan.run.model
    if file.name not in TEXTS or model is None:
        return file
    place = checkpoint.locate(model, plan.family)
    text = file.read_text(encoding="utf-8")
    known = base_id(plan) or Path(place).name
    return text.replace(str(Path(place).absolute()), known).replace(place, known).encode() if place else file


def _tried(repo_id: str, call: Callable[[], T]) -> T:
    """The answer, after several tries where the hub fails for a while. Raises Refused."""
    from huggingface_hub.errors import HfHubHTTPError

    for number in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            # The client's HTTP library is another in other versions of it.
            if not isinstance(error, (HfHubHTTPError, OSError)) and type(error).__module__.split(".")[0] not in HTTP:
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            if number == TRIES or (status is not None and status < 500):
                raise Refused(_problem(repo_id, status, error)) from error
            time.sleep(WAIT * number)
    raise AssertionError


def _problem(repo_id: str, status: int | None, error: Exception) -> Problem:
    later = "the export is kept; push it later with `ftcore export run=RUN '+export=[hub]'`"
    if status in (401, 403):
        fix = "use a token that may write there: HF_TOKEN, or `hf auth login`"
        return Problem("export.hub", f"the hub does not let this token write to {repo_id} ({status})", fix)
    if status is not None and status < 500:
        said = getattr(error, "server_message", None) or type(error).__name__
        return Problem("export.hub", f"the hub does not take the push to {repo_id} ({status}): {said}", later)
    said = f"answered {status}" if status else f"cannot be reached ({type(error).__name__})"
    return Problem("export.hub", f"the hub {said}, {TRIES} times", later, Exit.IO)
