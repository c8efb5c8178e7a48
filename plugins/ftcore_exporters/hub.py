"""Push of an export to the Hugging Face hub, with a model card.

The token comes from `HF_TOKEN` or from `hf auth login`, by huggingface_hub alone; ftcore neither asks for it nor keeps
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftcore import Artifact, Checkpoint, ExportConfig, Plan, Problem, hookimpl
from ftcore.errors import Exit

USUAL = ("safetensors", "adapter")
"""Exports that are pushed unless `what` says otherwise, the first of them that there is."""

BITS_PER_WEIGHT = 0
"""What is pushed was written by another export: the disk needs no room for the model's."""


@dataclass
class Config(ExportConfig):
    """The hub's settings."""

    repo_id: str = ""
    """Repository on the hub, `OWNER/NAME`; it is made where it does not exist."""
    what: str | None = None
    """Which export of the run is pushed, such as `adapter`, `gguf` or `fp8`; null takes the merged model, or the
    adapter."""
    private: bool = True
    """Make the repository private; a public one is not pushed to unless this is false."""
    revision: str | None = None
    """Branch to commit to, made where it does not exist; null takes the repository's main branch."""
    commit_message: str | None = None
    """Title of the commit; null takes `Upload by ftcore`."""
    license: str | None = None
    """Licence that the card names, by the hub's id such as `apache-2.0`; null says that it is unknown."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A repository's name, something to push, a token, and a hub that may be asked; nothing is sent."""
    return [*_names(plan.config(Config)), *_source(plan), *_access()]


def _names(config: Config) -> Iterator[Problem]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    fix = "give OWNER/NAME, such as export.hub.repo_id=me/my-model"
    try:
        if config.repo_id.count("/") != 1:
            raise HFValidationError("an owner and a name are needed")
        validate_repo_id(config.repo_id)
    except HFValidationError:
        yield Problem("export.hub.repo_id", f"'{config.repo_id}' is no name of a repository", fix)
    branch = config.revision
    if branch is not None and (not branch or ".." in branch or branch.startswith(("/", "-")) or " " in branch):
        yield Problem("export.hub.revision", f"'{branch}' is no name of a branch", "leave it out for the main branch")


def _source(plan: Plan) -> Iterator[Problem]:
    from ftcore.catalog import installed, nearest

    what, names = plan.config(Config).what, [name for name in installed().names("export") if name != "hub"]
    if what is not None and what not in names:
        near = nearest(what, names)
        fix = f"did you mean '{near}'?" if near else f"exports: {', '.join(names)}"
        yield Problem("export.hub.what", f"there is no export '{what}'", fix)
    elif _chosen(plan) is None:
        message = "there is nothing to push" if what is None else f"the run has no export '{what}'"
        yield Problem("export.hub", message, f"add one: '+export=[{what or USUAL[0]},hub]'")


def _chosen(plan: Plan) -> str | None:
    """The export that is pushed: one that this run writes, or wrote before."""
    what, planned = plan.config(Config).what, [name for name in plan.run.export if name != "hub"]
    there = {name for name in (*USUAL, *([what] if what else ())) if (plan.output_dir / "export" / name).exists()}
    if what is not None:
        return what if what in planned or what in there else None
    usual = [name for name in USUAL if name in planned] or [name for name in USUAL if name in there and not planned]
    return (usual or planned or [None])[0]


def _access() -> Iterator[Problem]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        message = "the hub may not be asked: HF_HUB_OFFLINE is set"
        yield Problem("export.hub", message, "unset HF_HUB_OFFLINE, or leave hub out")
    if get_token() is None:
        fix = "set HF_TOKEN, or log in with `hf auth login`"
        yield Problem("export.hub", "there is no token to push with", fix, Exit.MISSING_INPUT)


@hookimpl(trylast=True)  # once the other exports are there
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """One commit with the export's files and a card; the card is kept as `export/hub/README.md`.

    Raises Refused when the hub does not take it.
    """
    from ftcore.paths import whole_folder
    from ftcore.redaction import redact
    from ftcore_exporters._card import card
    from ftcore_exporters._hub_push import push

    config, what = plan.config(Config), _chosen(plan)
    assert what is not None
    source: Path = plan.output_dir / "export" / what
    text = redact(card(plan, what, source, config.repo_id, config.license))
    with whole_folder(plan.output_dir / "export" / "hub") as folder:
        (folder / "README.md").write_text(text, encoding="utf-8")
        address = push(
            plan,
            source,
            text,
            config.repo_id,
            private=config.private,
            revision=config.revision,
            message=config.commit_message or "Upload by ftcore",
        )
    return [Artifact.of("hub", plan.output_dir / "export" / "hub", f"{what} pushed: {address}")]
