"""What a kernel set keeps to."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

import pytest

from ftcore.manager import import_function
from ftcore.testing import maths, runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftcore.specs import Kernel


class KernelsContract(PluginContract):
    """A set offers kernels whose functions exist, and a model that uses them computes what it did before."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select a model with roles that the set has kernels for."""
    tolerance: ClassVar[float] = 1e-5
    """Relative distance, in norm, of the loss and of each gradient from plain transformers' in float32."""
    needs_gpu: ClassVar[bool] = False
    """Whether the kernels run on GPUs only, not even in Triton's interpreter."""

    def name(self) -> str:
        """The set's name."""
        return self.plugin.partition("/")[2]

    def offered(self) -> list[Kernel]:
        """What the set offers."""
        maths.needs_triton(self.name())
        return list(runs.prepared([*self.base, *self.selected()])[1].kernels)

    def test_kernels_are_named_and_can_be_installed(self) -> None:
        """`<set>.<op>` for a role, and `install` names a function of a module and a role."""
        offered = self.offered()
        assert offered
        for kernel in offered:
            assert all(kernel.name.partition("."))
            assert kernel.role
            install = import_function(kernel.install, kernel.name)
            inspect.signature(install).bind(object(), object())

    @pytest.mark.parametrize("adapter", ["lora", "full"])
    def test_maths_stays_the_same(self, adapter: str) -> None:
        """The set claims something, and loss and every gradient are plain transformers'."""
        import torch

        if self.needs_gpu and not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        maths.needs_triton(self.name())
        claimed = maths.assert_same_maths(
            [*self.base, *self.settings, f"adapter={adapter}"], self.name(), self.tolerance
        )
        assert {claim.kernel for claim in claimed.claims} <= {kernel.name for kernel in self.offered()}
