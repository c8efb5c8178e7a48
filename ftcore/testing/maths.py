"""Does a patched model compute what the plain one computes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ftcore.testing import runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ftcore.specs import Loaded, PatchReport


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance in norm."""
    norm = float(theirs.double().norm())
    distance = float((ours.double() - theirs.double()).norm())
    return distance / norm if norm else distance


Step = tuple["torch.Tensor", "dict[str, torch.Tensor]"]
"""A loss, and gradients by the names of their parameters."""


def loss_and_gradients(
    model: Any, batch: dict[str, torch.Tensor] | Sequence[dict[str, torch.Tensor]], labels: int | None = None
) -> Step:
    """The training loss, and the gradient of every trainable parameter by name.

    :param batch: Inputs with labels, or several whose losses are added.
    :param labels: Tokens that the sum of the losses is divided by; None takes the mean over those of the batch.
    """
    import torch

    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    losses = []
    for inputs in [batch] if isinstance(batch, dict) else batch:
        count = {} if labels is None else {"num_items_in_batch": torch.tensor(labels)}
        inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        loss = model(**inputs, **count).loss
        loss.backward()
        losses.append(loss.detach().cpu())
    # A copy: what one model returned must not change with the next pass.
    gradients = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).sum(), gradients


def assert_same_step(ours: Step, theirs: Step, tolerance: float, zero: Sequence[str] = ()) -> None:
    """Equal losses and gradients, and gradients that are not all zero.

    :param zero: Parts of the names of parameters whose gradient is zero by the maths, and noise in floating point: both
        are to be as small, measured by the norm of all gradients.
    """
    (our_loss, our_gradients), (loss, gradients) = ours, theirs
    assert apart(our_loss, loss) <= tolerance, "the loss differs"
    assert set(our_gradients) == set(gradients), "other parameters have gradients"
    assert any(g.norm() > 0 for g in gradients.values()), "nothing has a gradient, so nothing was compared"
    noise = {name for name in gradients if any(part in name for part in zero)}
    whole = sum(float(g.double().norm()) ** 2 for g in gradients.values()) ** 0.5
    loud = [name for name in noise for g in (our_gradients, gradients) if not g[name].norm() <= tolerance * whole]
    assert not loud, f"gradients are not zero: {loud}"
    kept = [name for name in gradients if name not in noise]
    far = {name: error for name in kept if not (error := apart(our_gradients[name], gradients[name])) <= tolerance}
    assert not far, f"gradients differ: {far}"


def assert_same_maths(
    overrides: Sequence[str], kernel_set: str, tolerance: float, batch: Any = None, zero: Sequence[str] = ()
) -> PatchReport:
    """Loss and every gradient with the kernel set equal plain transformers'; returns what was claimed."""
    plain = runs.loaded([*overrides, "kernels=[]"])
    ours = runs.loaded([*overrides, f"kernels=[{kernel_set}]"])
    if not ours.patches.claims:
        reasons = "; ".join(f"{skip.role}: {skip.reason}" for skip in ours.patches.skipped)
        pytest.skip(f"{kernel_set} has no kernel for this family: {reasons}")
    runs.shake(plain.model)
    ours.model.load_state_dict(plain.model.state_dict())
    batch = batch or runs.batch_for(plain.model)
    assert_same_step(loss_and_gradients(ours.model, batch), loss_and_gradients(plain.model, batch), tolerance, zero)
    return ours.patches


def assert_same_logits(ours: Loaded, theirs: Loaded, tolerance: float, batch: Any = None) -> None:
    """Both models say the same."""
    batch = batch or runs.batch_for(ours.model)
    distance = apart(runs.logits_of(ours.model, batch), runs.logits_of(theirs.model, batch))
    assert distance <= tolerance, f"logits differ by {distance:.2e}"


def needs_triton(kernel_set: str) -> None:
    """Skip where Triton can run neither on a GPU nor in its interpreter."""
    import importlib.util
    import os
    import sys

    if "triton" not in kernel_set:
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to try Triton's kernels without a GPU")
    if not torch.cuda.is_available() and not _interprets():
        pytest.fail(
            "triton was imported before TRITON_INTERPRET=1 was set: put `pytest_plugins = ['ftcore.testing']` earlier"
        )
    assert "triton" in sys.modules


def _interprets() -> bool:
    import triton.language as tl

    return type(tl.sum).__name__ != "JITFunction"
