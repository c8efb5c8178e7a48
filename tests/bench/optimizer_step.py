"""Times a step of 8-bit AdamW over bf16 parameters of Llama-3.2-1B's shapes: rounding to the nearest, and by chance.

    python tests/bench/optimizer_step.py
    python tests/bench/optimizer_step.py --device cpu --tiny

Both by turns in one process, over the same parameters and gradients, at a rate of 1e-5; medians after warm-up. Beside
them stands the part of the parameters that one step moved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from ftcore_kernels.optim.adamw_8bit import AdamW8bit

LAYER = (
    *((2048, 2048), (512, 2048), (512, 2048), (2048, 2048)),
    *((8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)),
)
SHAPES = [(128256, 2048), *16 * LAYER]
TINY = [(64, 128), (4096,)]
ROUNDINGS = {"nearest": None, "chance": 7}
WARMUP = 5


def main(words: list[str]) -> int:
    """A line for each way to round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few small parameters")
    found = parser.parse_args(words)
    parameters = [parameter(shape, found.device) for shape in (TINY if found.tiny else SHAPES)]
    optimizers = {name: AdamW8bit(parameters, lr=1e-5, rounding=seed) for name, seed in ROUNDINGS.items()}
    moved = {}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(WARMUP + found.steps):
        for name, optimizer in optimizers.items():
            last = turn == WARMUP - 1
            before = [p.detach().clone() for p in parameters] if last else []
            seconds = timed(optimizer, found.device)
            if last:
                moved[name] = sum(int((p != old).sum()) for p, old in zip(parameters, before, strict=True))
            if turn >= WARMUP:
                times[name].append(seconds)
    count = sum(p.numel() for p in parameters)
    for name, taken in times.items():
        said = f"{1000 * statistics.median(taken):.3f} ms over {count:,} parameters"
        print(f"{name}: {said}, {moved[name] / count:.1%} moved")
    return 0


def parameter(shape: tuple[int, ...], device: str) -> torch.nn.Parameter:
    """Random weights in bf16, with a gradient."""
    made = torch.nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02)
    made.grad = torch.randn(shape, device=device, dtype=torch.bfloat16) * 1e-3
    return made


def timed(optimizer: AdamW8bit, device: str) -> float:
    """Seconds of a step, by the GPU's own clock where there is one."""
    if device == "cpu":
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    optimizer.step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
