"""Recordings: read from a path, from bytes or from samples.

WAV is read by Python itself; other formats by soundfile, where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np

from ftcore.errors import Exit, Problem, Refused

Array = Any
"""A numpy array."""
LOUDEST = 4.0
"""Samples beyond this are whole numbers: nothing is recorded so far beyond 1."""
INSTALL = "pip install soundfile, or convert it: ffmpeg -i IN -ac 1 OUT.wav"


def length(audio: Any) -> tuple[int, float]:
    """Samples a second, and seconds; of a file only the head is read, and of WAV whether its end is there.

    Raises Refused for a recording that cannot be read.
    """
    if _in_memory(audio):
        samples, rate = read(audio)
        return rate, len(samples) / rate
    source = _source(audio)
    if (module := _soundfile()) is None:
        with _wave(source) as file:
            frames = file.getnframes()
            if frames:  # the last one is read: the head says how many there should be
                file.setpos(frames - 1)
                _whole(file, file.readframes(1), 1)
            return file.getframerate(), frames / file.getframerate()
    try:
        info = module.info(source)
    except (module.SoundFileError, OSError) as error:
        raise _unreadable(error) from error
    return info.samplerate, info.frames / info.samplerate


def read(audio: Any) -> tuple[Array, int]:
    """Samples in float32 from -1 to 1, the mean of the channels, and how many there are a second.

    :param audio: A path, bytes, `{path}` or `{bytes}`, `{array, sampling_rate}` with samples `[n]`, `[channels, n]` or
        `[n, channels]`, or a decoder as `datasets` gives it.

    Raises Refused for a recording that cannot be read.
    """
    if hasattr(audio, "get_all_samples"):
        decoded = audio.get_all_samples()
        return _mono(decoded.data.numpy().T), int(decoded.sample_rate)
    if _in_memory(audio):
        samples = np.asarray(audio["array"], dtype=np.float32)
        if samples.size and (loudest := float(np.abs(samples).max())) > LOUDEST:
            message = f"samples of a recording reach {loudest:g}, and lie from -1 to 1"
            raise Refused(Problem("data", message, "divide them, those of 16 bits by 32768", Exit.DATA))
        wide = samples.ndim == 2 and samples.shape[0] < samples.shape[1]  # a recording has fewer channels than samples
        return _mono(samples.T if wide else samples), int(audio["sampling_rate"])
    source = _source(audio)
    if (module := _soundfile()) is None:
        return _read_wave(source)
    try:
        samples, rate = module.read(source, dtype="float32")
    except (module.SoundFileError, OSError) as error:
        raise _unreadable(error) from error
    return _mono(samples), int(rate)


def _in_memory(audio: Any) -> bool:
    return hasattr(audio, "get_all_samples") or (isinstance(audio, Mapping) and audio.get("array") is not None)


def _source(audio: Any) -> Any:
    """A path, or a file in memory."""
    if isinstance(audio, Mapping):
        audio = audio.get("bytes") or audio.get("path")
    return io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)


def _soundfile() -> Any:
    return importlib.import_module("soundfile") if importlib.util.find_spec("soundfile") else None


def _wave(source: Any) -> wave.Wave_read:
    try:
        return wave.open(source, "rb")
    except (wave.Error, EOFError, OSError) as error:
        raise _unreadable(error) from error


def _read_wave(source: Any) -> tuple[Array, int]:
    with _wave(source) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        said = file.readframes(file.getnframes())
        _whole(file, said, file.getnframes())
        data = np.frombuffer(said, dtype=np.uint8).reshape(-1, width)
    if width == 1:  # the only width without a sign
        samples = data[:, 0].astype(np.float32) / 128 - 1
    else:
        wide = np.zeros((len(data), 4), dtype=np.uint8)
        wide[:, 4 - width :] = data
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return _mono(samples.reshape(-1, channels)), rate


def _whole(file: wave.Wave_read, said: bytes, frames: int) -> None:
    """Raises Refused where fewer frames were read than the file's head speaks of."""
    if len(said) != frames * file.getsampwidth() * file.getnchannels():
        message = "the recording cannot be read: it ends before its time"
        raise Refused(Problem("data", message, "copy or record it again", Exit.DATA))


def _mono(samples: Array) -> Array:
    """`[n]` of `[n]` or `[n, channels]`."""
    return (samples.mean(axis=1) if samples.ndim == 2 else samples).astype(np.float32)


def _unreadable(error: Exception) -> Refused:
    return Refused(Problem("data", f"the recording cannot be read: {error}", INSTALL, Exit.DATA))
