"""llama.cpp, the consumer of GGUF files: run in a process of its own, on the CPU."""

from __future__ import annotations

from ftcore.llama_cpp.client import LlamaCpp, installed

__all__ = ["LlamaCpp", "installed"]
