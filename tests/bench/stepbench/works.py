"""What is measured: the rows of work by name, and one side's share of a row."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ALL = "hf,liger,unsloth,trl,ftcore,ftcore_trainer"

LORA_8B = {"shape": "llama3.1-8b", "rows": 4, "length": 2048, "rank": 16}
NF4_8B = {**LORA_8B, "quantizer": "bnb_nf4"}
MID = {"rows": 4, "length": 2048, "rank": 16, "memory": "off", "sides": "hf,ftcore,ftcore_trainer"}

ROWS: dict[str, dict[str, Any]] = {
    "8b-lora": {**LORA_8B, "memory": "least,auto@19.4,auto"},
    "8b-lora-least": {**LORA_8B, "memory": "least"},
    "8b-lora-auto": {**LORA_8B, "memory": "auto"},
    "8b-lora-off": {**LORA_8B, "rows": 2, "memory": "off"},
    "8b-nf4": {**NF4_8B, "memory": "least,auto"},
    "8b-nf4-least": {**NF4_8B, "memory": "least"},
    "8b-nf4-auto": {**NF4_8B, "memory": "auto"},
    "8b-fp8-auto": {**LORA_8B, "quantizer": "fp8", "memory": "auto", "sides": "ftcore"},
    "1b-full": {"shape": "llama3.2-1b", "rank": 0, "memory": "off,auto@14.7", "optimizer": "adamw8bit"},
    "0.6b-lora": {"family": "qwen3", "shape": "qwen3-0.6b", "rows": 2, "length": 1024, "memory": "off"},
    "1b-qwen3": {**MID, "family": "qwen3", "shape": "qwen3-1.7b"},
    "1b-gemma3": {**MID, "family": "gemma3", "shape": "gemma3-1b"},
    "1b-mistral": {**MID, "family": "mistral", "shape": "mistral-1.1b-cut"},
    "1b-qwen3-moe": {**MID, "family": "qwen3_moe", "shape": "qwen3-moe-1.3b-cut"},
    "1b-qwen3-vl": {**MID, "family": "qwen3_vl", "shape": "qwen3-vl-2b", "images": 2, "sides": "hf,ftcore"},
}
"""Row to the options that it sets; options on the command line win over them."""

TINY = {"shape": "tiny", "rows": 2, "length": 32, "warmup": 1, "steps": 2}
"""What `--tiny` sets of a row."""


@dataclass(frozen=True)
class Work:
    """One side's job, passed to its process as JSON."""

    family: str
    shape: str
    rows: int
    length: int
    rank: int
    """Rank of LoRA on all that the family declares; 0 trains all weights."""
    quantizer: str
    kernels: str
    memory: str
    """ftcore's `memory`; with `@` and a number also its `memory_limit`."""
    recompute: bool
    """Gradient checkpointing of the peers; TRL keeps its default, which is on."""
    optimizer: str
    warmup: int
    steps: int
    device: str
    images: int = 0
    """Images of a row, in Qwen's layout: bare loops only."""
    profile: bool = False
    folder: str = ""
    """Checkpoint folder, the same for all sides."""
    auto_class: str = "AutoModelForCausalLM"
    targets: list[str] | str = field(default_factory=list)
    """Names of the linear layers that LoRA adapts, or the expression of their paths, the same for all sides."""
    parameters: list[str] = field(default_factory=list)
    """3-D weights of experts that LoRA adapts as well."""

    @property
    def tiny(self) -> bool:
        """The family's tiny model instead of a real shape."""
        return self.shape == "tiny"

    @property
    def dtype(self) -> str:
        """Name of the dtype of weights and products."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def total(self) -> int:
        """Steps, warm-up included."""
        return self.warmup + self.steps

    @property
    def tokens(self) -> int:
        """Tokens of a step; all are trained but those of images."""
        return self.rows * self.length

    @property
    def patches(self) -> int:
        """Patches along each side of an image: 512 pixels of Qwen3-VL's."""
        return 4 if self.tiny else 32

    def title(self) -> str:
        """The work in a line."""
        what = f"LoRA r{self.rank}" if self.rank else "full"
        weights = self.dtype if self.quantizer == "none" else self.quantizer
        what += " (experts too)" if self.rank and self.parameters else ""
        images = f" with {self.images} images of {self.patches}² patches a row" if self.images else ""
        peers = "on" if self.recompute else "off"
        return (
            f"{self.shape}, {what}, {weights}, {self.rows} x {self.length}{images}, {self.optimizer}, "
            f"kernels={self.kernels}, peers' gradient checkpointing {peers} (trl: its default, on)"
        )

    def text(self) -> str:
        """As JSON, for the command line of a side."""
        return json.dumps(asdict(self))


FREE = 12
"""Further steps of ftcore's sides that nobody waits for but at their end: how fast a run goes when it is left alone."""


def token_ids(work: Work) -> Any:
    """Random token ids [steps, rows, length], the same on every side and in every order of the same steps."""
    import torch

    config = json.loads((Path(work.folder) / "config.json").read_text(encoding="utf-8"))
    vocabulary = {**config, **config.get("text_config", {})}["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (work.total + FREE, work.rows, work.length), generator=generator)
