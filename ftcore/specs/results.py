"""What comes out of a run's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ftcore.specs.kernels import PatchReport
    from ftcore.specs.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One exported thing on disk."""

    target: str
    path: Path
    size: int
    """Bytes."""
    note: str = ""
    checks: Mapping[str, Any] = field(default_factory=dict)
    """What reading it back found: `verified`, the `consumer`, and its numbers; or `verified: False` and a `reason`."""

    @staticmethod
    def of(target: str, path: str | Path, note: str = "", checks: Mapping[str, Any] | None = None) -> Artifact:
        """An artifact with the size of the file, or of all files in the folder."""
        path = Path(path)
        files = path.rglob("*") if path.is_dir() else [path]
        count = sum(f.stat().st_size for f in files if f.is_file())
        return Artifact(target=target, path=path, size=count, note=note, checks=checks or {})


@dataclass(kw_only=True)
class Loaded:
    """A model that is ready to train, with its tokenizer and the plan it came from."""

    plan: Plan
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    patches: PatchReport


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to a prompt before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left behind; also written as `run.json`."""

    output_dir: Path
    metrics: Mapping[str, float]
    artifacts: Sequence[Artifact]
    patches: PatchReport
    timings: Mapping[str, float]
    """Seconds per stage."""
    answers: Sequence[Answer] = ()
