"""Unsloth's fast inference over its own model."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from rollbench.works import RollWork


def run(work: RollWork) -> dict[str, Any]:
    """`FastLanguageModel.for_inference`, then `generate`."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # it writes unsloth_compiled_cache/ where it runs
        import unsloth  # before transformers and peft, which it patches
        from stepbench.sides.unsloth import load

        from rollbench.sides.hf import written

        model = load(work)
        unsloth.FastLanguageModel.for_inference(model)
        result = written(work, model)
        os.chdir("/")
    return result
