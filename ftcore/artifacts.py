"""What was exported: as a person reads it, and as `run.json` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftcore import report
from ftcore.redaction import redacted
from ftcore.specs import Artifact

RUN_FILE = "run.json"


def listed(artifact: Artifact) -> dict[str, Any]:
    """An artifact for `run.json`; numbers that JSON does not have become null."""
    return {**asdict(artifact), "path": str(artifact.path), "checks": _plain(artifact.checks)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(redacted(state), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def record_exports(run: Path, artifacts: Sequence[Artifact]) -> None:
    """Add artifacts of a later export to a finished run's `run.json`, in the place of those that they replaced."""
    file = run / RUN_FILE
    if not file.is_file():
        return
    state = json.loads(file.read_text(encoding="utf-8"))
    by_path = {entry["path"]: entry for entry in [*state.get("artifacts", []), *map(listed, artifacts)]}
    write_state(file, {**state, "artifacts": list(by_path.values())})


def show_artifacts(artifacts: Sequence[Artifact], before: Iterable[Sequence[object]] = ()) -> None:
    """What was written, and what reading it back found; `before` are rows in front."""
    report.heading("Written")
    report.table([*before, *((a.target, a.path, report.size(a.size), a.note) for a in artifacts)])
    checked = [(a.path.name, _verdict(a.checks)) for a in artifacts if "verified" in a.checks]
    if checked:
        report.heading("Read back")
        report.table(checked)


def _verdict(checks: Mapping[str, Any]) -> str:
    consumer = checks.get("consumer", "its consumer")
    if not checks["verified"] and "max_logit_difference" not in checks:
        return f"not verified: {checks.get('reason', f'{consumer} did not read it')}"
    found = "agrees" if checks["verified"] else f"DISAGREES ({checks['reason']})" if "reason" in checks else "DISAGREES"
    words = [f"{consumer} {found}"]
    forms = (
        ("max_logit_difference", "logits within {:.2g}"),
        ("kl", "KL {:.2g}"),
        ("top1_agreement", "top-1 {:.1%}"),
        ("same_prompt_tokens", "prompt tokens {:.0%} the same"),
    )
    words += [form.format(checks[name]) for name, form in forms if isinstance(checks.get(name), (int, float))]
    if "same_greedy_text" in checks:
        words.append("same greedy text" if checks["same_greedy_text"] else "another greedy text")
    return ", ".join(words)
