"""Run by an interpreter that has vLLM: the log-probabilities that a folder's model gives to a text. Imports no ftcore.

`python -P _vllm_probe.py QUESTION ANSWER_FILE`, where QUESTION is JSON with `ids`, `folder`, `max_length`, and for an
adapter `base` and `rank`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(question: str, answer_file: str) -> None:
    """Load, ask, write the answer."""
    asked = json.loads(question)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"model": asked["base"] or asked["folder"], "max_model_len": asked["max_length"]}
    if asked["base"]:
        options |= {"enable_lora": True, "max_lora_rank": asked["rank"]}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = 0.3
    else:
        options["dtype"] = "float32"
    engine = vllm.LLM(**options, enforce_eager=True)
    lora = LoRARequest("trained", 1, asked["folder"]) if asked["base"] else None
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    (output,) = engine.generate([{"prompt_token_ids": asked["ids"]}], sampling, lora_request=lora)
    following = list(zip(asked["ids"][1:], output.prompt_logprobs[1:], strict=True))
    found = {
        "version": vllm.__version__,
        "logprobs": [table[token].logprob for token, table in following],
        "top": [min(table, key=lambda token: table[token].rank) for _, table in following],
    }
    Path(answer_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
