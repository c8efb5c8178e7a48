"""The primary Hydra config of ftcore, its recipes and its sweeps."""
