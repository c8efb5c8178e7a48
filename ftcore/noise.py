"""Keeps the libraries' own chatter out of ftcore's command line. Only `ftcore.cli` calls it."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet() -> None:
    """Libraries report errors only; their progress bars stay off, except for downloads on a terminal."""
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if not sys.stderr.isatty():
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "trl", "transformers", "accelerate", "huggingface_hub", "httpx", "math_verify"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("transformers", "trl", "peft", "torch", "datasets", "accelerate", "bitsandbytes"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
