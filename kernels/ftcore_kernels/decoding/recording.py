"""A step's launches as one CUDA graph: at these sizes launching costs more than computing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of RoPE whose angles do not depend on how long the rows have become, which transformers asks the device."""


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Replays the step, on the current device. It is run once before, so that kernels are compiled and libraries have
    their memory."""
    here = torch.cuda.current_stream()
    aside = _aside(here.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        usual = torch.cuda.graph.default_capture_stream  # of the device that recorded first
        stream = aside if usual is not None and usual.device != here.device else None
        # Other threads may pin memory meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    finally:
        torch.cuda.set_stream(here)  # where it fails, torch stays on the stream that it recorded
    return graph.replay


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The one stream for first runs: cuBLAS keeps 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def recordable(config: Any, device: torch.device) -> bool:
    """Whether a step of the model asks nothing of the host."""
    return device.type == "cuda" and fixed_rope(config)


def other_angles(config: Any) -> int | None:
    """Tokens of a row beyond which all of its tokens have other angles than before; None if that never comes.

    LongRoPE takes other factors from there on (Ding et al. 2024, arXiv 2402.13753).
    """
    text = config.get_text_config()
    ends = [
        kind.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        for kind in _kinds(text)
        if kind.get("rope_type") == "longrope"
    ]
    return min((int(end) for end in ends if end), default=None)


def fixed_rope(config: Any) -> bool:
    """Whether a token's angles depend on its place alone, and not on how long its row has become."""
    return all(kind.get("rope_type", "default") in FIXED_ROPE for kind in _kinds(config.get_text_config()))


def _kinds(text: Any) -> list[dict[str, Any]]:
    """One for all layers, or one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
