"""`ftcore export run=RUN +export=[...]`: write a finished run for another consumer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftcore import pipeline
from ftcore.artifacts import record_exports, show_artifacts
from ftcore.errors import Problem, Refused
from ftcore.tasks._config import config_of, need_run
from ftcore.tasks._trained import prepared


def main(argv: list[str]) -> int:
    """Run the exporters on what the run trained; artifacts go into the run's own folder by default."""
    config = config_of(argv)
    need_run(config, "export", "ftcore export run=runs/smollm2-sft-001 '+export=[safetensors]'")
    if not config.export:
        raise Refused(
            Problem(
                "export", "no exporter is selected", "add '+export=[safetensors]'; `ftcore plugins export` lists them"
            )
        )
    target = config.output_dir if any(w.startswith("output_dir=") for w in argv) else config.run
    hooks, plan = prepared(replace(config, output_dir=target))
    written = pipeline.stored_exports(hooks, plan)
    if written.artifacts:
        record_exports(Path(str(config.run)), written.artifacts)
        show_artifacts(written.artifacts)
    written.raise_failed()
    return 0
