"""Parts of a model that kernels take over, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from ftcore.device import Device


class Phase(Enum):
    """When a kernel is put in place: on the loaded base model, or once the adapter is there."""

    BASE = "base"
    ADAPTED = "adapted"


@dataclass(frozen=True, slots=True)
class Role:
    """A part of a family that kernels can take over: every instance of the module class named `module`."""

    name: str
    module: str
    traits: frozenset[str] = frozenset()
    """Departures from the plain form, such as `unit_offset`; a kernel that does not list them all is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What a kernel needs of the machine."""

    device: str | None = None
    """`cuda`, `cpu`, or `triton` (a GPU or Triton's interpreter); null runs anywhere."""
    capability: tuple[int, int] | None = None
    """Lowest CUDA compute capability."""

    def missing(self, device: Device) -> str | None:
        """Why this device will not do, or None when it will."""
        if (self.device == "cuda" and device.kind != "cuda") or (self.device == "triton" and not device.runs_triton):
            return "needs a GPU"
        if self.device == "cpu" and device.kind != "cpu":
            return "is for CPUs"
        if self.capability and device.kind == "cuda" and device.capability < self.capability:
            return f"needs compute capability {'.'.join(map(str, self.capability))}"
        return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that a set offers for a role."""

    name: str
    """`<set>.<op>`, such as `triton.rms_norm`."""
    role: str
    install: str
    """`package.module:function`, imported when the kernel is claimed; called as `install(module, role)`."""
    traits: frozenset[str] = frozenset()
    """Traits of the role that the kernel's maths covers."""
    phase: Phase = Phase.BASE
    needs: Requirement = field(default_factory=Requirement)
    fits: str | None = None
    """`package.module:function`, called as `fits(module, role, plan)` on the loaded model, before the adapter is there;
    returns why the kernel cannot take this module in this run, or None."""
    outermost: bool = False
    """Whether it is put on the adapter's wrapper around the module, where there is one, not on the module itself."""


@dataclass(frozen=True, slots=True)
class Level:
    """One choice of what a module keeps for its backward pass."""

    kept: int
    """Bytes kept until the backward."""
    again: float
    """Floating-point operations computed again in the backward."""


class Recomputing(Protocol):
    """What a module carries as `ftcore_recompute` whose kernel keeps as much for its backward as it is told.

    `memory` tells it; modules without it are recomputed whole by transformers' checkpointing, or not at all.
    """

    choose: Callable[[int, int], int] | None
    """From rows and row length of a batch to the index of a level; None keeps everything."""
    may_record: bool
    """Whether launches may be recorded, which takes memory of its own."""
    away: bool
    """Whether the input, which every level keeps, waits in host memory for the backward."""
    attended: bool
    """Whether attention's output waits there too, so that the backward need not attend again."""
    inside: bool
    """Whether not even the input is kept, where it is the output of a module like this: that makes it again."""
    tiled: bool
    """Whether it works in tiles of rows where there are many, which takes less memory for a while."""
    width: int
    """Bytes of an element of the activations: 4 where the run computes in float32, else 2."""

    @property
    def recorded(self) -> float:
        """Batches of fewer tokens have their launches recorded, once for each shape; 0 where none is."""
        ...

    def forget(self) -> None:
        """Let go of recorded launches and the memory that they hold: there was too little."""
        ...

    def levels(self, rows: int, length: int) -> Sequence[Level]:
        """The choices for a batch, the one that keeps least first, the one that keeps everything last."""
        ...

    def input_bytes(self, rows: int, length: int) -> int:
        """Bytes of a level that `away` takes off the GPU."""
        ...

    def moved(self, rows: int, length: int) -> int:
        """The same; 0 where the copies would keep the GPU waiting."""
        ...

    def attended_bytes(self, rows: int, length: int) -> tuple[int, int]:
        """Bytes that `attended` sends to host memory, and bytes that it keeps on the GPU for them until the backward.

        Zeros where the copies would keep the GPU waiting.
        """
        ...

    def workspace(self, rows: int, length: int, tiled: bool = False) -> int:
        """Bytes that one backward pass of the module needs for a while; fewer in tiles, where there are many rows."""
        ...

    def follow(self, before: Any) -> None:
        """Record the launches of small batches on a GPU; `before` is the one before this in the model, or None."""
        ...


class Leaving(Protocol):
    """What a module carries as `ftcore_host_weights` whose frozen embedding and head may wait in host memory."""

    def embedding(self) -> Any | None:
        """The input embedding's parameter, where it may leave the GPU for good: lookups reach it where it is."""
        ...

    def head(self) -> Any | None:
        """The head's, where it may: it is on the GPU only while the head works."""
        ...

    def leave(self, head: bool = True) -> int:
        """Move both, or the embedding alone, out of the GPU. Returns the bytes that left."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One kernel on one module instance."""

    module: str
    role: str
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A role that stays plain transformers, and why."""

    role: str
    module: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchReport:
    """Every claim, and a reason for every role that has none."""

    claims: tuple[Claim, ...] = ()
    skipped: tuple[Skip, ...] = ()

    def counts(self) -> dict[tuple[str, str], int]:
        """(role, kernel) to the number of module instances."""
        counts: dict[tuple[str, str], int] = {}
        for claim in self.claims:
            counts[claim.role, claim.kernel] = counts.get((claim.role, claim.kernel), 0) + 1
        return counts
