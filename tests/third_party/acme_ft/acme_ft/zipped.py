"""The merged model as one zip file with a checksum of every file in it, to hand over or to upload."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, ExportConfig, Plan, Problem, hookimpl

MANIFEST = "MANIFEST.json"


@dataclass
class Config(ExportConfig):
    """The zip export's settings."""

    compression: int = 0
    """0 stores the files as they are (weights hardly shrink), 1 to 9 compress them, 9 the most."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A level that zip has."""
    level = plan.config(Config).compression
    if not 0 <= level <= 9:
        return [Problem("export.acme_zip.compression", f"is {level}", "give a number from 0 to 9")]
    return []


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """`export/acme.zip`: a transformers folder and its manifest."""
    level = plan.config(Config).compression
    target = plan.output_dir / "export" / "acme.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    sums = {}
    with zipfile.ZipFile(
        unfinished, "w", zipfile.ZIP_DEFLATED if level else zipfile.ZIP_STORED, compresslevel=level or None
    ) as archive:
        for file in sorted(checkpoint.merged().iterdir()):
            archive.write(file, file.name)
            sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        archive.writestr(MANIFEST, json.dumps(sums, indent=2))
    unfinished.replace(target)
    return [Artifact.of("acme_zip", target, note=f"{len(sums)} files and {MANIFEST}")]
