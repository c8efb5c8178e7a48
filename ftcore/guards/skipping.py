"""How an optimizer is kept from a step that is not finite.

PyTorch's fused optimizers and ftcore's 8-bit AdamW read a flag on the device and leave everything as it is, so nothing
waits. The others (plain `adamw_torch`, `sgd`, bitsandbytes') cannot: for those the host looks at the flag before the
step, which costs the launch of the step, and takes the gradients away.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Step(Protocol):
    """The values that decide over a step: the loss and the norm of its gradient."""

    def values(self) -> tuple[float, float]:
        """Both, once they are known; may wait for the device."""
        ...


class OnHost:
    """Values that the host waits for."""

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        found, of_gradient = _both(loss, norm).tolist()  # one wait, not two
        self._values = (found, of_gradient)

    def values(self) -> tuple[float, float]:
        """Known already."""
        return self._values


class OnDevice:
    """Values that come to the host by themselves, and a flag that the optimizer reads on the device.

    `flag` is a float32 scalar, 1 where either is not finite, else 0.
    """

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        both = _both(loss, norm)
        # x - x is 0 for a number, and NaN for NaN and infinity.
        self.flag = torch.ne((both - both).sum(), 0, out=torch.empty((), device=both.device))
        on_gpu = both.device.type == "cuda"
        self._host = torch.empty(2, pin_memory=on_gpu).copy_(both, non_blocking=True)
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def values(self) -> tuple[float, float]:
        """Wait for the copy alone, not for what was launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm = self._host.tolist()
        return loss, norm


def _both(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`[2]` float32."""
    return torch.stack([loss.float().reshape(()), norm.float().reshape(()).to(loss.device)])


def reads_flag(optimizer: Any, device: torch.device) -> bool:
    """Whether an optimizer skips a step by a flag on the device."""
    inner = innermost(optimizer)
    fused = getattr(inner, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in inner.param_groups)
    return device.type == "cuda" and (fused or hasattr(inner, "uncount_step"))


def give_flag(optimizer: Any, step: OnDevice) -> None:
    """Have the next step read the flag."""
    innermost(optimizer).found_inf = step.flag


def forget_step(optimizer: Any) -> None:
    """After a step that was skipped on the device: take back what the host counted."""
    uncount = getattr(innermost(optimizer), "uncount_step", None)
    if uncount is not None:
        uncount()


def innermost(optimizer: Any) -> Any:
    """The optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
