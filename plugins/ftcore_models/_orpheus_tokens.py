"""The tokens that Orpheus adds to Llama 3's: `<custom_token_0>` and so on, of which the first ten mark the parts."""

from __future__ import annotations

from ftcore_data.codes import CODEBOOK, LAYERS

RATE = 24_000
"""Samples a second of the codec's recordings."""
MARKS = 10
"""Tokens in front of the codes', some of them unused."""


def _token(number: int) -> str:
    return f"<custom_token_{number}>"


START_OF_SPEECH, END_OF_SPEECH, START_OF_HUMAN, END_OF_HUMAN, START_OF_AI, END_OF_AI = map(_token, range(1, 7))
ALL = tuple(map(_token, range(MARKS + len(LAYERS) * CODEBOOK)))
