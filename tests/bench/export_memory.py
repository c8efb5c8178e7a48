"""Peak host memory and throughput of exports of a 1B model with an adapter, from its files.

    python tests/bench/export_memory.py [safetensors gguf:f16 gguf:q8_0 gguf:q4_k_m]

A random model of the Llama-3.2-1B shape is written in files of at most 256 MB (its embedding, 525 MB, has one of its
own), an adapter of rank 16 beside it. Each export runs in a process of its own, which notes its resident memory once
everything is imported and the highest that it reaches (`VmHWM`, Linux). Nothing is read back (`verify=false`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = ("safetensors", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m")
LIMIT = 2**30


def make(folder: Path, shape: str = "llama3.2-1b") -> None:
    """The checkpoint in `folder/base`, the adapter in `folder/adapter`; both random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftcore.bytes_tokenizer import byte_tokenizer
    from ftcore.testing import runs
    from ftcore_models.llama import SHAPES, ftcore_model_family

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES[shape])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="256MB")
    byte_tokenizer().save_pretrained(folder / "base")
    targets = list(ftcore_model_family().lora_targets)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    runs.shake(adapted, trainable_only=True)
    adapted.save_pretrained(folder / "adapter")


def resident(field: str) -> int:
    """Bytes that this process holds (`VmRSS`), or held at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(folder: Path, target: str) -> dict[str, float]:
    """Run one export in this process."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from ftcore import pipeline
    from ftcore.testing import runs

    name, _, kind = target.partition(":")
    words = [f"export.{name}.types=[{kind}]"] if kind else []
    hooks, plan = runs.prepared(
        [
            *("+model=llama", f"model.path='{folder / 'base'}'", f"adapter.path='{folder / 'adapter'}'"),
            *(f"+export=[{name}]", f"export.{name}.verify=false", f"output_dir='{folder / 'out'}'", *words),
        ]
    )
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    start = time.perf_counter()
    artifacts = pipeline.export_stored(hooks, plan)
    seconds = time.perf_counter() - start
    size = sum(artifact.size for artifact in artifacts)
    return {"above": resident("VmHWM") - before, "imports": before, "seconds": seconds, "bytes": size}


def main(targets: list[str]) -> int:
    """Measure each target in a process of its own; 1 where one took more than 1 GiB above the imports."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--make", name], check=True)
        for target in targets:
            one = [sys.executable, __file__, "--one", name, target]
            done = subprocess.run(one, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            worst = max(worst, found["above"])
            above, imports = found["above"] / 2**20, found["imports"] / 2**20
            rate = found["bytes"] / 1e6 / found["seconds"]
            print(f"{target:16} peak {above:6.0f} MiB above {imports:.0f} MiB of imports", end="", flush=True)
            print(f", {found['bytes'] / 1e6:6.0f} MB in {found['seconds']:5.1f} s, {rate:.0f} MB/s", flush=True)
            assert (folder / "out").is_dir()
    return int(worst > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        sys.exit(main(sys.argv[1:] or list(TARGETS)))
