"""ftcore: fine-tune large language models with plugins. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcore.api import export, load, run
    from ftcore.composition import compose
    from ftcore.config import (
        AdapterConfig,
        DataConfig,
        ExportConfig,
        ExtraConfig,
        GeneratorConfig,
        KernelsConfig,
        ModelConfig,
        QuantizerConfig,
        RewardConfig,
        RunConfig,
        TrainerConfig,
    )
    from ftcore.errors import FtcoreError, Problem, Refused
    from ftcore.hooks import hookimpl
    from ftcore.patching import bind
    from ftcore.specs import (
        Artifact,
        Bundle,
        Chat,
        Completions,
        DataFormat,
        Kernel,
        Limit,
        ModelFamily,
        Passes,
        Phase,
        Plan,
        Requirement,
        Role,
        RunResult,
        Sampling,
        Shape,
        TrainerSpec,
        Vision,
    )
    from ftcore.trained_model import Checkpoint

_HOMES = {
    "ftcore.api": ("export", "load", "run"),
    "ftcore.composition": ("compose",),
    "ftcore.config": (
        "AdapterConfig",
        "DataConfig",
        "ExportConfig",
        "ExtraConfig",
        "GeneratorConfig",
        "KernelsConfig",
        "ModelConfig",
        "QuantizerConfig",
        "RewardConfig",
        "RunConfig",
        "TrainerConfig",
    ),
    "ftcore.errors": ("FtcoreError", "Problem", "Refused"),
    "ftcore.hooks": ("hookimpl",),
    "ftcore.patching": ("bind",),
    "ftcore.specs": (
        "Artifact",
        "Bundle",
        "Chat",
        "Completions",
        "DataFormat",
        "Kernel",
        "Limit",
        "ModelFamily",
        "Passes",
        "Phase",
        "Plan",
        "Requirement",
        "Role",
        "RunResult",
        "Sampling",
        "Shape",
        "TrainerSpec",
        "Vision",
    ),
    "ftcore.trained_model": ("Checkpoint",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "Artifact",
    "Bundle",
    "Chat",
    "Checkpoint",
    "Completions",
    "DataConfig",
    "DataFormat",
    "ExportConfig",
    "ExtraConfig",
    "FtcoreError",
    "GeneratorConfig",
    "Kernel",
    "KernelsConfig",
    "Limit",
    "ModelConfig",
    "ModelFamily",
    "Passes",
    "Phase",
    "Plan",
    "Problem",
    "QuantizerConfig",
    "Refused",
    "Requirement",
    "RewardConfig",
    "Role",
    "RunConfig",
    "RunResult",
    "Sampling",
    "Shape",
    "TrainerConfig",
    "TrainerSpec",
    "Vision",
    "bind",
    "compose",
    "export",
    "hookimpl",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ftcore' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
