"""The exporters of a run, each by itself: what one of them refuses keeps no other from writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ftcore import hooks as h
from ftcore.errors import Refused
from ftcore.manager import Hooks
from ftcore.report import note
from ftcore.specs import Artifact
from ftcore.trained_model import Checkpoint


@dataclass(frozen=True)
class Exports:
    """What was written, and what was not."""

    artifacts: Sequence[Artifact]
    failed: Mapping[str, Exception]
    """Names of plugins to what they raised."""

    def raise_failed(self, run: Path | None = None) -> None:
        """Raise what the exporters raised, all refusals at once; nothing where all did their work.

        :param run: folder of the run that holds what was trained, for the fix.
        """
        if not self.failed:
            return
        hint = f"what was trained is kept: ftcore export run={run} '+export=[...]'" if run else ""
        errors = list(self.failed.values())
        refused = [problem for error in errors if isinstance(error, Refused) for problem in error.problems]
        others = [error for error in errors if not isinstance(error, Refused)]
        if not others:
            *first, last = refused
            raise Refused(*first, replace(last, fix="; ".join(filter(None, (last.fix, hint)))))
        for name, error in self.failed.items():
            if error is not others[0]:
                note(f"{name}: {error}")
        if hint:
            note(hint)
        raise others[0]


def exports(hooks: Hooks, checkpoint: Checkpoint) -> Exports:
    """Ask every selected exporter. One that comes after all others, as the hub does, is left out where one failed."""
    try:
        artifacts, failed, skipped = hooks.collect_apart(h.ftcore_export, plan=checkpoint.plan, checkpoint=checkpoint)
    finally:
        checkpoint.discard()
    for name in skipped:
        note(f"{name}: left out, since it takes what others write, and {', '.join(failed)} wrote nothing")
    return Exports(artifacts, failed)
