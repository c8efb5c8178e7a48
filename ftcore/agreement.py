"""How far two models' logits lie apart, and how far they may for each type that weights are stored in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROWS = 16
"""Positions that are compared at once: bounds the float64 copies, 32 MiB each for a vocabulary of 262,144."""


@dataclass(frozen=True)
class Tolerance:
    """What an artifact must keep to; None asks for finite numbers only, which are then reported."""

    logits: float | None = None
    """Largest absolute difference of a logit."""
    kl: float | None = None
    """Mean Kullback-Leibler divergence of the consumer's next token from the model's, in nats."""
    relative: float | None = None
    """Norm of the difference over the norm of the model's values: for heads and encoders, which tell no next token."""


REPORTED = Tolerance()
"""Nothing but finite numbers: for types that change what the model says, by how much being the user's choice."""
TOLERANCES = {
    "f32": Tolerance(logits=1e-3, kl=1e-6, relative=1e-4),
    "f16": Tolerance(kl=1e-3, relative=1e-2),
    "bf16": Tolerance(kl=1e-2, relative=5e-2),
    "q8_0": Tolerance(kl=2e-2, relative=5e-2),
}
"""By the type that most weights are stored in; types that are not named are `REPORTED`.

float32 leaves the order of additions as the only difference, below 1e-4 but for Gemma, whose GELU llama.cpp reads from
a table in float16 (7e-4). float16 and bfloat16 keep 11 and 8 bits of a weight, q8_0
keeps 8 bits with a scale for every 32 weights, and llama.cpp rounds activations likewise before it multiplies them.
Measured in llama.cpp on SmolLM2-135M over 308 positions: f32 2e-11, f16 8e-6, bf16 3e-4, q8_0 7e-3 (3e-3 of it by the
weights alone). A file with a wrong tensor is further off by orders of magnitude.
"""
LOGIT_ROUNDING = 3e-5
"""Differences up to this part of the largest logit are rounding too: a logit of 50 is known to 1.5e-3 after many
layers in float32."""
ROUNDED_REFERENCE = Tolerance(kl=1e-2, relative=5e-2)
"""At least this is allowed where the trained model itself computes in 16 bits: it is the less exact of the two."""


def tolerance(kind: str, reference_dtype: str) -> Tolerance:
    """What an artifact of this type must keep to beside a model that computes in `reference_dtype`."""
    asked = TOLERANCES.get(kind, REPORTED)
    if asked is REPORTED or reference_dtype == "float32":
        return asked
    wider = ROUNDED_REFERENCE
    return Tolerance(kl=max(asked.kl or 0, wider.kl or 0), relative=max(asked.relative or 0, wider.relative or 0))


@dataclass
class Agreement:
    """Sums over the positions that were compared."""

    tokens: bool = True
    """The values are logits of a next token; otherwise those of a head, or hidden states."""
    positions: int = 0
    largest: float = 0.0
    """Largest absolute difference of a logit."""
    scale: float = 0.0
    """Largest absolute logit of the reference."""
    divergence: float = field(default=0.0, repr=False)
    agreed: int = field(default=0, repr=False)
    apart: float = field(default=0.0, repr=False)
    """Sum of the squared differences."""
    norm: float = field(default=0.0, repr=False)
    """Sum of the squared values of the reference."""

    def add(self, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Compare logits `[positions, vocab]`; where one vocabulary is padded, the columns that both have."""
        width = min(wanted.shape[-1], found.shape[-1])
        for start in range(0, len(wanted), ROWS):
            ours = wanted[start : start + ROWS, :width].double()
            theirs = found[start : start + ROWS, :width].double()
            difference = float((ours - theirs).abs().max())
            self.largest = difference if not difference <= self.largest else self.largest  # NaN stays
            self.scale = max(self.scale, float(ours.abs().max()))
            self.apart += float((ours - theirs).square().sum())
            self.norm += float(ours.square().sum())
            expected, given = ours.log_softmax(-1), theirs.log_softmax(-1)
            self.divergence += float((expected.exp() * (expected - given)).sum())
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.positions += len(ours)

    @property
    def kl(self) -> float:
        """Mean KL(model || consumer), nats."""
        return self.divergence / max(self.positions, 1)

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the reference."""
        return math.sqrt(self.apart / self.norm) if self.norm else math.sqrt(self.apart)

    def numbers(self) -> dict[str, Any]:
        """As `run.json` keeps them."""
        found: dict[str, Any] = {"positions": self.positions, "max_logit_difference": self.largest}
        if not self.tokens:
            return {**found, "relative_difference": self.relative}
        return {**found, "kl": self.kl, "top1_agreement": self.agreed / max(self.positions, 1)}

    def objection(self, allowed: Tolerance) -> str | None:
        """Why the two do not agree well enough, or None."""
        if not math.isfinite(self.largest) or not math.isfinite(self.kl):
            return "its logits are not finite"
        if not self.tokens:
            over = allowed.relative is not None and self.relative > allowed.relative
            return f"values differ by {self.relative:.2g} of their norm, more than {allowed.relative}" if over else None
        if allowed.logits is not None and self.largest > max(allowed.logits, LOGIT_ROUNDING * self.scale):
            return f"logits differ by up to {self.largest:.2g}, more than {allowed.logits:.0e}"
        if allowed.kl is not None and self.kl > allowed.kl:
            return f"the mean KL divergence is {self.kl:.2g}, more than {allowed.kl:.0e}"
        return None
