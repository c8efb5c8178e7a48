"""The noise of `ftcore_kernels.reference._hash`, bit for bit."""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """`lowbias32`, of uint32."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def spread(key, at):
    """Noise of every place `at`, uint32."""
    return mix(mix(at.to(tl.uint32) * 0x9E3779B9 + key) ^ key)
