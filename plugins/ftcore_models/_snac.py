"""SNAC, the codec of Orpheus' speech (Siuzdak et al. 2024, arXiv 2410.14411): an optional package."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from ftcore import Problem, Refused
from ftcore.errors import Exit
from ftcore_data.codes import LAYERS, interleaved
from ftcore_models._orpheus_tokens import RATE

CODES_INSTEAD = "or give rows that bring their codes: data=codes"
STRIDES = [4, 2, 1]
"""Frames of the finest codebook to one of each."""


def missing(place: str) -> Problem | None:
    """Why recordings cannot become codes, found without loading the codec; None when they can.

    :param place: hub id or folder of the codec.
    """
    if importlib.util.find_spec("snac") is None:
        message = "recordings become codes by the package snac, which is not installed"
        return Problem("data", message, f"pip install 'ftcore[orpheus]', {CODES_INSTEAD}")
    file = Path(place) / "config.json" if Path(place).is_dir() else _from_hub(place)
    if file is None or not file.is_file():
        message = f"the codec {place} is no folder with a config.json, and cannot be had from the hub"
        return Problem("model.codec", message, f"give a folder with the codec, {CODES_INSTEAD}", Exit.MISSING_INPUT)
    config = _read(file)
    if (config.get("sampling_rate"), config.get("vq_strides")) != (RATE, STRIDES):
        message = f"the codec {place} is another than SNAC at {RATE} samples a second, whose codes Orpheus speaks"
        return Problem("model.codec", message, "leave it out, or give a copy of hubertsiuzdak/snac_24khz")
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _from_hub(place: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, "config.json", etag_timeout=5))
    except Exception:  # no such codec, no hub, no network: what to do is the same
        return None


class Snac:
    """The codec, loaded; its weights are asked for on the hub, or read from a folder."""

    def __init__(self, place: str, device: str) -> None:
        self._model: Any = importlib.import_module("snac").SNAC.from_pretrained(place).eval().to(device)
        self._device = device

    def codes(self, samples: Any, rate: int) -> list[int]:
        """Samples `[n]` in float32 -> codes from 0 to 4095, seven for each 2048 samples.

        A frame whose first code is that of the frame before is left out, as in the rows that the checkpoints were
        trained on. Raises Refused for another rate than the codec's.
        """
        import torch

        if rate != RATE or not len(samples):
            message = f"the recording has {len(samples)} samples, {rate} a second, and the codec takes {RATE} a second"
            fix = f"convert it: ffmpeg -i IN -ar {RATE} -ac 1 OUT.wav"
            raise Refused(Problem("data", message, fix, Exit.DATA))
        wave = torch.from_numpy(samples)[None, None].to(self._device)
        with torch.inference_mode():
            layers = [layer[0].tolist() for layer in self._model.encode(wave)]
        return without_repeats(interleaved(layers))


def without_repeats(codes: list[int]) -> list[int]:
    """The frames whose first code is not that of the frame before."""
    size = len(LAYERS)
    frames = [codes[start : start + size] for start in range(0, len(codes), size)]
    kept = [frame for number, frame in enumerate(frames) if not number or frame[0] != frames[number - 1][0]]
    return [code for frame in kept for code in frame]
