"""Compares the forecast of memory with what steps on this GPU take, in one process.

    python tests/bench/forecast_error.py
    python tests/bench/forecast_error.py --only qwen3 --device cpu --tiny

Random weights of real shapes; a step is what its trainer asks of the model: for `dpo` the reference's pass and the
policy's over pairs, for `grpo` completions by `generator=fast` and a pass over them. Measured is
`torch.cuda.max_memory_allocated` over two steps after warm-up, and what CUDA graphs hold besides. A row is off where
the forecast is more than 10 % above or 5 % below; then the exit code is 1. Times are shown and not judged.
Results also go to `$OUT/forecast-error.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30
ABOVE, BELOW = 0.10, 0.05
"""Parts by which a forecast may miss what was measured."""
WARMUP = 5
"""Steps after which launches are recorded and the optimizer has its state."""
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One configuration."""

    family: str
    shape: str
    weights: str
    """`lora`, `nf4` or `full`."""
    memory: str
    trainer: str
    rows: int
    """Rows of the data set in a micro-batch: a pair is one."""
    length: int
    written: int = 0
    """Tokens of a sequence that are written first."""

    @property
    def name(self) -> str:
        """In the table."""
        return f"{self.shape} {self.weights} {self.memory} {self.trainer} {self.rows} x {self.length}"

    def words(self, device: str, tiny: bool) -> list[str]:
        """The ftcore command."""
        kind = {
            "lora": ["adapter.r=16"],
            "nf4": ["adapter.r=16", "+quantizer=bnb_nf4"],
            "full": ["adapter=full", "trainer.optimizer=adamw_8bit"],
        }[self.weights]
        if tiny:
            kind = [word for word in kind if "nf4" not in word and "8bit" not in word]
        on_cpu = device == "cpu" and self.memory == "offload"
        return [
            f"+model={self.family}",
            "model.tiny=true" if tiny else f"model.shape={self.shape}",
            f"model.dtype={'float32' if device == 'cpu' else 'bfloat16'}",
            *kind,
            f"+trainer={self.trainer}",
            f"memory={'least' if on_cpu else self.memory}",
            f"trainer.micro_batch={self.rows}",
            f"trainer.global_batch={self.rows}",
            f"trainer.max_length={32 if tiny else self.length}",
            *(
                ["generator=fast", f"trainer.max_completion_length={4 if tiny else self.written}"]
                if self.written
                else []
            ),
            "output_dir=nowhere",
        ]


CASES = (
    Case("qwen3", "qwen3-0.6b", "lora", "off", "sft", 2, 1024),
    Case("qwen3", "qwen3-0.6b", "full", "least", "sft", 4, 4096),
    Case("qwen3", "qwen3-0.6b", "lora", "least", "grpo", 8, 2048, written=64),
    Case("qwen3", "qwen3-1.7b", "lora", "off", "sft", 4, 2048),
    Case("qwen3", "qwen3-1.7b", "lora", "off", "dpo", 2, 2048),
    Case("llama", "llama3.2-1b", "full", "off", "sft", 4, 2048),
    Case("llama", "llama3.2-1b", "lora", "least", "dpo", 4, 4096),
    Case("llama", "llama3.2-1b", "lora", "offload", "sft", 1, 65_536),
    Case("llama", "llama3.2-1b", "lora", "off", "grpo", 8, 1024, written=64),
    Case("gemma3", "gemma3-1b", "lora", "off", "sft", 4, 2048),
    Case("gemma3", "gemma3-1b", "full", "least", "sft", 4, 4096),
    Case("qwen3", "qwen3-0.6b", "nf4", "offload", "sft", 1, 32_768),  # the one whose weights are written to disk first
)


class RandomWeights:
    """A plugin that makes a model of random weights where it is computed; what is quantized comes from a folder."""

    def __init__(self, device: str) -> None:
        from ftcore import hookimpl

        def ftcore_load_model(plan: Any, quantization: Any) -> Any:
            import torch
            import transformers

            from ftcore import checkpoint

            if quantization is not None:
                return None
            auto = getattr(transformers, plan.family.auto_class)
            config = checkpoint.config_of(plan.run.model, plan.family)
            with torch.device(device):
                model = auto.from_config(config, dtype=getattr(torch, plan.dtype))
            model.config.use_cache = model.config.get_text_config().use_cache = False
            return model

        self.ftcore_load_model = hookimpl(ftcore_load_model)


class Trained:
    """A loaded model, and the step that its trainer would take."""

    def __init__(self, case: Case, hooks: Any, plan: Any, device: str, sequences: int) -> None:
        import torch

        from ftcore import hooks as h
        from ftcore import pipeline

        self.case, self.plan, self.device = case, plan, device
        self.length, self.sequences = plan.run.trainer.max_length, sequences
        tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, get_vocab=dict)
        self.model: Any = pipeline.load(hooks, plan, tokenizer).model.train()
        self.vocabulary = self.model.config.get_text_config().vocab_size
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=self.model)
        self.optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-5, fused=device != "cpu")
        self.generator = hooks.maybe(h.ftcore_make_generator, plan=plan, model=self.model, tokenizer=tokenizer)

    def step(self) -> None:
        """Forward, backward and update."""
        import torch

        ids = torch.randint(self.vocabulary, (self.sequences, self.length)).to(self.device)
        if self.case.written:
            ids = self._written(ids)
        with self._autocast():
            if self.case.trainer == "sft":
                loss = self.model(input_ids=ids, labels=ids, fused_loss=True).loss
            else:
                loss = self._by_logprobs(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _autocast(self) -> Any:
        import torch

        return torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu")

    def _by_logprobs(self, ids: Any) -> Any:
        """A loss that weighs sequences by what their log-probabilities are."""
        import torch

        logprobs = self.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum(1)
        if self.case.trainer == "dpo":
            with torch.no_grad(), self.model.disable_adapter():
                reference = self.model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum(1)
            ratio = logprobs - reference
            half = len(ids) // 2
            return -torch.nn.functional.logsigmoid(0.1 * (ratio[:half] - ratio[half:])).mean()
        return -(logprobs / ids.shape[1]).mean()

    def _written(self, ids: Any) -> Any:
        """The sequences, whose ends the model writes."""
        import torch

        from ftcore.specs import Sampling

        wanted = self.plan.run.trainer.max_completion_length
        prompts = ids[:, :-wanted].tolist()
        completions = self.generator.generate(prompts, Sampling(max_new_tokens=wanted)).ids
        made = [
            [*prompt, *said, *[0] * (wanted - len(said))] for prompt, said in zip(prompts, completions, strict=True)
        ]
        return torch.tensor(made, device=self.device)


def measured(case: Case, device: str, tiny: bool) -> dict[str, Any]:
    """What was said and what was taken."""
    import torch
    from stepbench.loop import of_graphs

    from ftcore import pipeline
    from ftcore.api import validated
    from ftcore.cards import of_size, present
    from ftcore.config import Memory
    from ftcore.forecast import Forecast
    from ftcore.meta_model import on_meta
    from ftcore.step_time import Pace

    started = time.monotonic()
    hooks, plan = pipeline.prepare(validated(case.words(device, tiny)), [RandomWeights(device)])
    forecast = Forecast.of(plan, on_meta(hooks, plan)[0])
    if isinstance(forecast, str):
        raise SystemExit(f"{case.name}: no forecast: {forecast}")
    memory, rows, length = Memory[case.memory], forecast.rows, forecast.length
    # The generator takes as many rows at once as there are, where nothing is short.
    sequences = rows * forecast.passes.sequences
    said = max(forecast.peak(memory, rows, length), forecast.writing(memory, sequences, length))
    card = present(plan.device) if device == "cuda" else of_size(80)
    gpu = device == "cuda"
    trained = Trained(case, hooks, plan, device, sequences)
    for _ in range(1 if tiny else WARMUP):
        trained.step()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = time.monotonic()
    for _ in range(STEPS):
        trained.step()
    if gpu:
        torch.cuda.synchronize()
    took = (time.monotonic() - before) / STEPS
    peak = torch.cuda.max_memory_allocated() + of_graphs() if gpu else 0
    del trained
    gc.collect()
    if gpu:
        # A run has those of its own streams, not those of every case before it.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
    return {
        "case": asdict(case),
        "said_gib": said / GIB,
        "peak_gib": peak / GIB,
        "fixed_gib": forecast.fixed / GIB,
        "kept_gib": forecast.kept(forecast.layout(memory, rows, length), sequences, length) / GIB,
        "left_gib": torch.cuda.memory_allocated() / GIB if gpu else 0.0,
        "step_said": Pace(forecast, card).step(memory, rows, length),
        "step": took,
        "seconds": time.monotonic() - started,
    }


def error(result: dict[str, Any]) -> float | None:
    """By what part the forecast is above what was measured; None where nothing was."""
    return result["said_gib"] / result["peak_gib"] - 1 if result["peak_gib"] else None


def good(result: dict[str, Any]) -> bool:
    """Whether the forecast is near enough."""
    off = error(result)
    return off is None or -BELOW <= off <= ABOVE


def line(name: str, result: dict[str, Any]) -> str:
    """A row of the table."""
    off = error(result)
    miss = "      -" if off is None else f"{off:+7.1%}{'' if good(result) else ' OFF'}"
    return (
        f"{name:46s} said {result['said_gib']:6.2f} GiB  measured {result['peak_gib']:6.2f}  {miss}  "
        f"step ~{result['step_said']:.3f} s, {result['step']:.3f}  ({result['seconds']:.0f} s)"
    )


def main(words: list[str]) -> int:
    """Run all cases, and say which are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has one of these in it, with |")
    parser.add_argument("--limit", type=float, default=140, help="seconds after which no further case is begun")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="the families' tiny models, and one step of warm-up")
    found = parser.parse_args(words)
    results, started = [], time.monotonic()
    for case in CASES:
        if not any(part in case.name for part in found.only.split("|")):
            continue
        if time.monotonic() - started > found.limit:
            print(f"{case.name:46s} not run: over --limit {found.limit:.0f}", flush=True)
            continue
        result = measured(case, found.device, found.tiny)
        print(line(case.name, result), flush=True)
        results.append(result)
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            Path(out, "forecast-error.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    off = [result for result in results if not good(result)]
    print(f"{len(results)} cases, {len(off)} beyond +{ABOVE:.0%} / -{BELOW:.0%}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
