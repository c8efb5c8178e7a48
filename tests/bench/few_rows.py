"""Times products of a few rows with NF4 and float8 weights of an 8B model, in every configuration of a list.

    python tests/bench/few_rows.py
    python tests/bench/few_rows.py --rows 16 --shapes out,down
    python tests/bench/few_rows.py --device cpu --tiny

Each product is a CUDA graph over copies of its weights that the second-level cache cannot hold, with LoRA's A below
them, and is compared with float64. Beside the best configurations stand the product with unpacked 16-bit weights,
dequantizing before every product, and the float8 product of cuBLAS, which pads. What a step of 32 layers takes is
their sum, 32 times; the last lines are those of `TABLE` in `ftcore_kernels/ops/nf4_rows.py` and `fp8_rows.py`. Results
also go to `$OUT/few-rows.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

LAYERS = 32
RANK = 16
SHAPES = {
    "qkv": ((4096, 1024, 1024), 4096),
    "out": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
"""Product to the rows of its weights, and K."""
TINY = {"qkv": ((40, 8, 8), 128), "down": ((33,), 192)}
ROWS = (1, 8, 16, 32, 64)
CUTS = [
    *[(64, 128, 4, 1, fill, "shuffle") for fill in (3, 5, 10)],
    *[(64, 64, 4, 1, fill, "shuffle") for fill in (4, 6)],
    *[(128, 64, 4, 1, fill, "shuffle") for fill in (3, 5)],
    *[(64, 256, 4, 1, fill, "shuffle") for fill in (2, 4, 8)],
    *[(128, 128, 4, 1, fill, "shuffle") for fill in (2, 3, 6)],
    *[(128, 128, 8, 1, fill, "shuffle") for fill in (2, 4, 8)],
    *[(128, 256, 8, 1, fill, "shuffle") for fill in (1, 2)],
    *[(64, 128, 4, 3, fill, "shuffle") for fill in (4, 8)],
    *[(128, 128, 8, 3, fill, "shuffle") for fill in (2, 4)],
    (64, 128, 4, 1, 5, "gather"),
    (128, 128, 8, 1, 4, "gather"),
]
"""Fields of `nf4_rows.Config`."""
FP8_CUTS = [
    *[(64, 128, 4, 4, fill) for fill in (3, 5)],
    *[(64, 256, 4, 3, fill) for fill in (2, 4)],
    *[(128, 128, 8, 4, fill) for fill in (2, 3)],
    *[(128, 128, 4, 3, fill) for fill in (2, 4)],
]
"""Fields of `fp8_rows.Config`."""
TINY_CUTS = [(64, 128, 4, 1, 4, "gather"), (64, 64, 4, 2, 8, "gather")]
TINY_FP8_CUTS = [(64, 128, 4, 3, 4)]
CACHED = 2**28
"""Bytes of weights that no cache holds."""
PROCESSES = 14


@dataclass(frozen=True)
class Case:
    """A product: rows of x, and whose weights."""

    shape: str
    widths: tuple[int, ...]
    inputs: int
    rows: int
    device: str

    @property
    def tile(self) -> int:
        """Rows that are multiplied with."""
        return min(64, max(16, 1 << (self.rows - 1).bit_length()))

    @property
    def extra(self) -> int:
        """Rows of LoRA's A."""
        return RANK * len(self.widths)

    @property
    def packed_bytes(self) -> float:
        """Weights, the codes of their scales, those of the scales' scales, and A."""
        return sum(self.widths) * self.inputs * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * self.extra * self.inputs

    @property
    def fp8_bytes(self) -> float:
        """Weights, and A."""
        return sum(self.widths) * self.inputs + 2 * self.extra * self.inputs

    def copies(self, size: float) -> int:
        """Of something of `size` bytes, as many as no cache holds."""
        return 1 if self.device == "cpu" else max(2, int(-(-CACHED // size)))


def main(words: list[str]) -> int:
    """Measure, print, and judge."""
    found = arguments(words)
    if found.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    shapes, cuts = (TINY, TINY_CUTS + TINY_FP8_CUTS) if found.tiny else (SHAPES, CUTS + FP8_CUTS)
    names = found.shapes.split(",") if found.shapes else list(shapes)
    several = [int(rows) for rows in found.rows.split(",")] if found.rows else (1, 5) if found.tiny else ROWS
    cases = [Case(name, *shapes[name], rows, found.device) for rows in several for name in names]
    start = time.monotonic()
    if found.device == "cuda":
        compile_ahead(cases, cuts)
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    for case in cases:
        results += measured(case, cuts)
        print(line(case, [result for result in results if result["case"] == asdict(case)]), flush=True)
    print("\n".join(steps(results, several)))
    print(f"{time.monotonic() - start:.0f} s together")
    keep(words, results)
    wrong = [result for result in results if result["status"] != "ok"]
    for result in wrong:
        print(f"{result['case']['shape']} x {result['case']['rows']} {result['what']}: {result['status']}")
    return 1 if wrong else 0


def arguments(words: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help=f"rows of x, such as 1,16; all of {ROWS} unless given")
    parser.add_argument("--shapes", default="", help=f"some of {','.join(SHAPES)}; all unless given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for Triton's interpreter")
    return parser.parse_args(words)


def compile_ahead(cases: list[Case], cuts: list[tuple[Any, ...]]) -> None:
    """Fill Triton's cache from several processes: compiling takes longer than measuring."""
    jobs: dict[tuple[Any, ...], list[tuple[Case, tuple[Any, ...]]]] = {}
    for case in cases:
        for cut in cuts:  # those that differ in the shape or in parts of K alone share kernels: one process
            jobs.setdefault((case.tile, len(case.widths), *cut[:4], *cut[5:]), []).append((case, cut))
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compiled, jobs.values()))


def _compiled(jobs: list[tuple[Case, tuple[Any, ...]]]) -> None:
    for case, cut in jobs:
        try:
            make, weights = (_packed_calls, _weights) if is_nf4(cut) else (_fp8_calls, _fp8_weights)
            make(case, cut, weights(case, 1))[0]()
        except Exception as error:  # the measurement meets it again, and says it
            print(f"{case.shape} {cut}: {error}".splitlines()[0])


def measured(case: Case, cuts: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every way to compute one product: seconds of each, after a look at the first one's result."""
    import torch

    weights, in_fp8 = _weights(case, case.copies(case.packed_bytes)), _fp8_weights(case, case.copies(case.fp8_bytes))
    truth, fp8_truth = _truth(case, weights[0]), _fp8_truth(in_fp8[0])
    precise = weights[0][0].dtype == torch.float32
    ways: list[tuple[str, Any, Callable[[], list[Callable[[], torch.Tensor]]]]] = []
    for cut in cuts:
        if is_nf4(cut):
            ways.append((f"nf4 {cut}", truth, partial(_packed_calls, case, cut, weights)))
        else:
            ways.append((f"fp8 {cut}", fp8_truth, partial(_fp8_calls, case, cut, in_fp8)))
    ways += [
        ("unpacked", truth, partial(_unpacked_calls, case, weights)),
        ("dequantized", truth, partial(_dequantized, case, weights)),
        ("fp8 padded", fp8_truth, partial(_padded_calls, in_fp8)),
    ]
    results = []
    for what, expected, make in ways:
        result: dict[str, Any] = {"case": asdict(case), "what": what, "status": "ok", "seconds": None}
        try:
            calls = make()
            off = float((calls[0]().double() - expected).norm() / expected.norm())
            if not off < (1e-5 if precise else 4e-3):
                result["status"] = f"WRONG: {off:.1e} off float64"
            result |= {"off": off, "seconds": timed(calls, case.device)}
        except Exception as error:  # a configuration that does not fit the GPU: the others are still worth knowing
            result["status"] = f"{type(error).__name__}: {error}".splitlines()[0]
        results.append(result)
    return results


def is_nf4(cut: tuple[Any, ...]) -> bool:
    """Whether it says how numbers are looked up."""
    return len(cut) == 6


def timed(calls: list[Callable[[], Any]], device: str) -> float:
    """Seconds of one of them, all recorded as one graph; the least of five."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1000 / len(calls))
    return min(times)


def _weights(case: Case, copies: int) -> list[tuple[Any, list[Any], Any]]:
    """Copies of x, packed weights and A: random bytes, scales as weights have them."""
    import torch

    from ftcore_kernels.reference.nf4_dequantize import AbsmaxState
    from ftcore_kernels.reference.nf4_rows import Packed

    device, dtype = case.device, torch.float32 if case.device == "cpu" else torch.bfloat16
    drawn = torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"generator": drawn, "device": device}

    def one(width: int) -> Packed:
        blocks = width * case.inputs // 64
        scales = torch.rand(-(-blocks // 256), **options) * 0.05
        codes = torch.linspace(-1, 1, 256, device=device)
        return Packed(
            torch.randint(256, (width * case.inputs // 2, 1), dtype=torch.uint8, **options),
            torch.randint(256, (blocks,), dtype=torch.uint8, **options),
            torch.Size((width, case.inputs)), 64, AbsmaxState(codes, scales, torch.tensor(0.07, device=device)),
        )  # fmt: skip

    x = torch.randn((case.rows, case.inputs), **options).to(dtype)
    below = (torch.randn((case.extra, case.inputs), **options) * 0.02).to(dtype)
    return [(x, [one(width) for width in case.widths], below.clone()) for _ in range(copies)]


def _dense(case: Case, copy: tuple[Any, list[Any], Any], out: Any = None) -> Any:
    """The weights of a copy, dequantized, and A below them."""
    import torch

    from ftcore_kernels.ops.nf4_dequantize import nf4_dequantize

    x, weights, below = copy
    if out is None:
        out = torch.empty((sum(case.widths) + case.extra, case.inputs), dtype=x.dtype, device=x.device)
    first = 0
    for weight in weights:
        rows = out[first : first + weight.shape[0]]
        nf4_dequantize(weight.packed, weight.absmax, weight.shape, 64, x.dtype, weight.nested, out=rows)
        first += weight.shape[0]
    out[first:] = below
    return out


def _truth(case: Case, copy: tuple[Any, list[Any], Any]) -> Any:
    return copy[0].double() @ _dense(case, copy).double().T


def _packed_calls(case: Case, cut: tuple[Any, ...], weights: Iterable[tuple[Any, list[Any], Any]]) -> list[Any]:
    from ftcore_kernels.ops.nf4_rows import Config, nf4_rows

    return [partial(nf4_rows, *copy, config=Config(*cut)) for copy in weights]


def _unpacked_calls(case: Case, weights: list[tuple[Any, list[Any], Any]]) -> list[Any]:
    import torch

    copies = case.copies(2 * case.inputs * sum(case.widths))
    return [
        lambda x=copy[0], dense=_dense(case, copy): torch.mm(x, dense.T)  # noqa: B008  now, not when it is called
        for copy in weights[:copies]
    ]


def _dequantized(case: Case, weights: list[tuple[Any, list[Any], Any]]) -> list[Any]:
    import torch

    out = _dense(case, weights[0])
    return [lambda copy=copy: torch.mm(copy[0], _dense(case, copy, out).T) for copy in weights]


def _fp8_weights(case: Case, copies: int) -> list[tuple[Any, Any, Any, Any]]:
    """Copies of x, float8 weights and their scales, and A."""
    import torch

    size, dtype = (sum(case.widths), case.inputs), torch.float32 if case.device == "cpu" else torch.bfloat16
    drawn = torch.Generator(case.device).manual_seed(2)
    options: dict[str, Any] = {"generator": drawn, "device": case.device}
    x, below = (torch.randn((rows, case.inputs), **options).to(dtype) for rows in (case.rows, case.extra))
    scale = torch.rand(size[0], **options)
    return [
        (x, torch.randint(0x70, size, dtype=torch.uint8, **options).view(torch.float8_e4m3fn), scale, below)
        for _ in range(copies)
    ]


def _fp8_truth(copy: tuple[Any, ...]) -> Any:
    import torch

    from ftcore_kernels.reference.fp8_linear import quantize_rows

    x, q, scale, below = copy
    q_x, scale_x = quantize_rows(x)
    y = (q_x.double() * scale_x.double()[:, None]) @ (q.double() * scale.double()[:, None]).T
    return torch.cat((y, x.double() @ below.double().T), dim=1)


def _fp8_calls(case: Case, cut: tuple[Any, ...], weights: list[tuple[Any, Any, Any, Any]]) -> list[Any]:
    from ftcore_kernels.ops.fp8_rows import Config, fp8_rows

    return [partial(fp8_rows, *copy, config=Config(*cut)) for copy in weights]


def _padded_calls(weights: list[tuple[Any, ...]]) -> list[Any]:
    """As `quantizer=fp8` multiplies in training; A is multiplied on its own."""
    import torch

    from ftcore_kernels.ops.fp8_linear import fp8_mm

    def call(x: Any, q: Any, scale: Any, below: Any) -> Any:
        y = x.new_empty((x.shape[0], q.shape[0] + below.shape[0]))
        torch.mm(x, below.T, out=y[:, q.shape[0] :])
        fp8_mm(x, q, scale, out=y[:, : q.shape[0]])
        return y

    return [partial(call, *copy) for copy in weights]


def line(case: Case, results: list[dict[str, Any]]) -> str:
    """A product's best configurations, and the other ways."""
    good = sorted((result for result in results if result["status"] == "ok"), key=lambda result: result["seconds"])
    said = []
    for kind, size in (("nf4 (", case.packed_bytes), ("fp8 (", case.fp8_bytes)):
        best = next((result for result in good if result["what"].startswith(kind)), None)
        if best is not None:
            said.append(f"{best['what']} {1e6 * best['seconds']:.1f} us, {size / best['seconds'] / 1e9:.0f} GB/s")
    said += [f"{result['what']} {1e6 * result['seconds']:.1f}" for result in good if "(" not in result["what"]]
    return f"{case.shape:7} x {case.rows:2}: " + "; ".join(said)


def steps(results: list[dict[str, Any]], several: Iterable[int]) -> Iterable[str]:
    """For each number of rows what all products of a step take, by one configuration for all; and the tables' lines."""
    tables: dict[str, dict[int, str]] = {"nf4": {}, "fp8": {}}
    for rows in several:
        sums: dict[str, float] = {}
        mine = [result for result in results if result["case"]["rows"] == rows]
        failed = {result["what"] for result in mine if result["status"] != "ok"}
        for result in mine:
            if result["what"] not in failed:
                sums[result["what"]] = sums.get(result["what"], 0.0) + 1000 * LAYERS * result["seconds"]
        ranked = sorted((ms, what) for what, ms in sums.items() if "(" in what)
        said = [f"{what} {ms:.2f}" for what, ms in sums.items() if "(" not in what]
        for kind, table in tables.items():
            best = [(ms, what) for ms, what in ranked if what.startswith(kind)][:3]
            said += [f"{what} {ms:.2f}" for ms, what in best]
            if best:
                table[Case("", (), 0, rows, "").tile] = best[0][1].removeprefix(f"{kind} ")
        yield f"a step x {rows}, ms: " + "; ".join(said)
    for kind, table in tables.items():
        yield f"{kind} TABLE = {{" + ", ".join(f"{rows}: Config{what}" for rows, what in table.items()) + "}"


def keep(words: list[str], results: list[dict[str, Any]]) -> None:
    """Write what was measured into `$OUT`."""
    if not (out := os.environ.get("OUT")):
        return
    import torch

    Path(out).mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = json.dumps({"command": ["python", "tests/bench/few_rows.py", *words], "gpu": gpu, "results": results})
    (Path(out) / "few-rows.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
