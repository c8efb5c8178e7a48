"""Liger's kernels on the plain model, its fused linear cross entropy included."""

from __future__ import annotations

from typing import Any

from stepbench.loop import measure
from stepbench.sides import hf
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """The base is patched before its adapter comes, as transformers' Trainer does with `use_liger_kernel`."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = hf.base(work)
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True, cross_entropy=False)
    return measure(work, hf.adapted(work, model))
