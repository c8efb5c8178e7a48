"""A folder loaded by vLLM, where it is installed: the log-probabilities that it gives against a model's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftcore import Checkpoint
from ftcore.redaction import without_secrets

PYTHON = "FTCORE_VLLM_PYTHON"
"""Environment variable with the Python of another environment that vLLM is installed in."""
LIMIT = 480.0
"""Seconds that vLLM has to load a model and answer."""
CLOSE = 0.05
"""Largest mean difference of log-probabilities, in nats, that 16-bit weights and another engine's kernels may make."""
PACKED = 0.5
"""The same for packed weights, whose kernels round activations as well, to 8 bits and each in its own way."""
TOKENS, CONTEXT = 128, 2048
"""Tokens that are compared, and the longest context that vLLM makes room for."""


def by_vllm(checkpoint: Checkpoint, folder: Path, model: Any = None, close: float = CLOSE) -> dict[str, Any] | str:
    """What vLLM says to a short text, against what `model` says; `unverified` where vLLM is not installed.

    :param folder: a model, or an adapter, which is served over its base.
    :param model: None takes the trained model.
    :param close: how far log-probabilities may be apart on average, in nats.
    """
    python = os.environ.get(PYTHON) or (sys.executable if find_spec("vllm") else None)
    if python is None:
        return "unverified"
    ids = _tokens(checkpoint)
    try:
        answer = _asked(python, _question(checkpoint, folder, ids))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"verified": False, "reason": f"vLLM did not answer: {error}"}
    return _compared(checkpoint.model if model is None else model, ids, answer, close)


def _tokens(checkpoint: Checkpoint) -> list[int]:
    from ftcore.consumers import Transformers
    from ftcore.probes import texts

    given, rendered = texts(checkpoint.plan, checkpoint.tokenizer)
    return Transformers(checkpoint.model, checkpoint.tokenizer, rendered).tokens(" ".join(given))[:TOKENS]


def _question(checkpoint: Checkpoint, folder: Path, ids: list[int]) -> dict[str, Any]:
    """What the probe is asked."""
    from ftcore_exporters._adapter_lint import lint
    from ftcore_exporters._served import base_of
    from ftcore_exporters._serving import context_length

    asked: dict[str, Any] = {"ids": ids, "folder": str(folder.absolute()), "base": None}
    asked["max_length"] = min(context_length(checkpoint) or CONTEXT, CONTEXT)
    if (folder / "adapter_config.json").is_file():
        asked |= {"base": base_of(checkpoint.plan), "rank": lint(folder).max_lora_rank}
    return asked


def _asked(python: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run the probe. Raises ValueError with the last error that it told when it ends without an answer."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "answer.json"
        # -P: the folder of the probe, with a module called `vllm`, must not be searched.
        line = [python, "-P", str(Path(__file__).with_name("_vllm_probe.py")), json.dumps(asked), str(out)]
        # What this environment adds to the search path is not for another one.
        clean = without_secrets()
        if python != sys.executable:
            clean.pop("PYTHONPATH", None)
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT, cwd=place, env=clean)
        if not out.is_file():
            said = [text for text in (done.stdout + done.stderr).splitlines() if "Error" in text]
            raise ValueError(said[-1].strip() if said else f"exit code {done.returncode}")
        answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return answer


def _compared(model: Any, ids: list[int], answer: Mapping[str, Any], close: float) -> dict[str, Any]:
    import torch

    from ftcore.answers import evaluating

    with evaluating(model), torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, :-1]
    wanted = logits.float().cpu().log_softmax(-1)
    own = wanted.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    apart = (own - torch.tensor(answer["logprobs"])).abs()
    mean = float(apart.mean())
    reason = {} if mean <= close else {"reason": f"log-probabilities differ by {mean:.3g} on average"}
    return {
        "verified": not reason,
        **reason,
        "version": answer["version"],
        "positions": len(apart),
        "max_logprob_difference": float(apart.max()),
        "mean_logprob_difference": mean,
        "top1_agreement": float((wanted.argmax(-1) == torch.tensor(answer["top"])).float().mean()),
    }
