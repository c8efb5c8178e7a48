"""Triton kernels of ftcore, each beside a plain PyTorch twin.

`ops/NAME.py` holds the Triton forward and backward and imports triton. `reference/NAME.py` holds the same function
in plain PyTorch: the definition, the CPU path and the fallback. Importing this package imports neither.
"""
