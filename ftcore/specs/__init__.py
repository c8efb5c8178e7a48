"""The frozen objects that flow through a run. Nothing here imports torch when it is imported."""

from __future__ import annotations

from ftcore.specs.data import DataFormat, Shape
from ftcore.specs.family import Bundle, Chat, Limit, ModelFamily, Vision
from ftcore.specs.kernels import Claim, Kernel, Leaving, Level, PatchReport, Phase, Recomputing, Requirement, Role, Skip
from ftcore.specs.plan import Plan, PluginInfo
from ftcore.specs.results import Answer, Artifact, Loaded, RunResult
from ftcore.specs.training import (
    Batching,
    Completions,
    Conversing,
    Generator,
    KeepsBeside,
    Passes,
    Reward,
    Sampling,
    Streaming,
    TrainerSpec,
    TrainReport,
)

__all__ = [
    "Answer",
    "Artifact",
    "Batching",
    "Bundle",
    "Chat",
    "Claim",
    "Completions",
    "Conversing",
    "DataFormat",
    "Generator",
    "KeepsBeside",
    "Kernel",
    "Leaving",
    "Level",
    "Limit",
    "Loaded",
    "ModelFamily",
    "Passes",
    "PatchReport",
    "Phase",
    "Plan",
    "PluginInfo",
    "Recomputing",
    "Requirement",
    "Reward",
    "Role",
    "RunResult",
    "Sampling",
    "Shape",
    "Skip",
    "Streaming",
    "TrainReport",
    "TrainerSpec",
    "Vision",
]
