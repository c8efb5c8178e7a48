"""The contract of every kernel set."""

from ftcore.testing import KernelsContract

pytest_plugins = ["ftcore.testing"]


class TestAuto(KernelsContract):
    plugin = "kernels/auto"


class TestReference(KernelsContract):
    plugin = "kernels/reference"


class TestTriton(KernelsContract):
    plugin = "kernels/triton"
