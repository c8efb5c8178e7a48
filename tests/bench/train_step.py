"""Times a bare LoRA training step of plain Hugging Face (transformers + PEFT) and of ftcore, in a process each.

    python tests/bench/train_step.py --family llama --shape llama3.1-8b --rows 4 --length 2048 --memory least

Random weights of a real shape, real random token ids, all linear projections adapted, fused AdamW; the median of the
timed steps after warm-up; peak is `torch.cuda.max_memory_allocated`. Both sides start from the same checkpoint folder,
and their first losses must agree within 0.5 %, or the table says so and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

SIDES = ("hf", "ftcore")
GIB = 2**30


def arguments() -> argparse.Namespace:
    """The work, and for the inner processes the side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", choices=("off", "least"), default="least")
    parser.add_argument("--quantizer", choices=("none", "bnb_nf4"), default="none")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--side", choices=SIDES)
    return parser.parse_args()


def overrides(work: argparse.Namespace) -> list[str]:
    """The ftcore command of the work."""
    words = [f"+model={work.family}", f"model.shape={work.shape}", f"adapter.r={work.rank}", "adapter.alpha=32"]
    if work.quantizer != "none":
        words.append(f"+quantizer={work.quantizer}")
    return [*words, f"kernels=[{work.kernels}]", f"memory={work.memory}"]


def load(work: argparse.Namespace) -> Any:
    """The adapted model of a side, on the GPU, ready to train."""
    from ftcore import pipeline
    from ftcore.api import validated

    hooks, plan = pipeline.prepare(validated(overrides(work)))
    if work.side == "ftcore":
        return pipeline.load(hooks, plan).model
    return load_plain(work, plan)


def load_plain(work: argparse.Namespace, plan: Any) -> Any:
    """transformers and PEFT as their documentation shows them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ftcore import checkpoint

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if work.quantizer == "bnb_nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(checkpoint.locate(plan.run.model, plan.family), **options)
    model.config.use_cache = False
    config = LoraConfig(
        task_type="CAUSAL_LM", r=work.rank, lora_alpha=32, target_modules=list(plan.family.lora_targets)
    )
    model = get_peft_model(model, config)
    if work.memory == "least":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def measure(work: argparse.Namespace) -> dict[str, float]:
    """Median step time, tokens a second, peak memory and the first loss of a side."""
    import torch

    torch.manual_seed(0)
    model = load(work).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    shape = (work.warmup + work.steps, work.rows, work.length)
    batches = torch.randint(vocabulary, shape, generator=generator).cuda()
    losses, times = [], []
    for step, ids in enumerate(batches):
        if step == work.warmup:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    seconds = statistics.median(times[work.warmup :])
    return {
        "tokens_per_second": work.rows * work.length / seconds,
        "step_ms": 1000 * seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "first_loss": losses[0],
    }


def main() -> int:
    """Run every side in its own process, and print the table."""
    work = arguments()
    if work.side:
        print("RESULT " + json.dumps(measure(work)), flush=True)
        return 0
    results: dict[str, dict[str, float]] = {}
    for side in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{side}: failed\n{done.stderr[-2000:]}")
            continue
        results[side] = json.loads(lines[0].removeprefix("RESULT "))
    print(f"{work.shape}, {work.rows} x {work.length}, r{work.rank}, {work.quantizer}, memory={work.memory}")
    for side, result in results.items():
        ratio = result["tokens_per_second"] / results["hf"]["tokens_per_second"] if "hf" in results else float("nan")
        print(
            f"  {side:8} {result['tokens_per_second']:9,.0f} tok/s  {ratio:5.2f}x  {result['step_ms']:8.1f} ms  "
            f"{result['peak_gib']:6.2f} GiB  first loss {result['first_loss']:.4f}"
        )
    losses = [result["first_loss"] for result in results.values()]
    agree = len(losses) == len(SIDES) and max(losses) - min(losses) <= 0.005 * min(losses)
    print("first losses agree within 0.5 %" if agree else "FIRST LOSSES DISAGREE, or a side failed")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
