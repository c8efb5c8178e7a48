"""Which ops there are, for which roles and traits; each in Triton and in plain PyTorch."""

from __future__ import annotations

from ftcore import Kernel, Requirement

LAYERS = {
    "rms_norm": ("rms_norm", "rms_norm", frozenset({"unit_offset"})),
    "swiglu": ("mlp", "mlp", frozenset()),
    "rope": ("attention", "attention", frozenset({"qk_norm"})),
}
"""Op to the role that it serves, the module of `layers` that binds it, and the traits that it covers."""

GPU = Requirement(device="cuda", capability=(7, 0))
TRITON = Requirement(device="triton", capability=(7, 0))


def kernels(implementation: str, needs: Requirement) -> list[Kernel]:
    """All ops in one implementation: `triton` or `reference`."""
    return [
        Kernel(
            f"{implementation}.{op}",
            role,
            install=f"ftcore_kernels.layers.{layer}:install_{implementation}",
            traits=traits,
            needs=needs,
        )
        for op, (role, layer, traits) in LAYERS.items()
    ]
