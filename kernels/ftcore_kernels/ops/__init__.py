"""Triton operations, one per module; import one only when its kernel is claimed (triton is absent on some systems)."""
