"""The typed configuration of a run: :class:`RunConfig`, and one base dataclass per kind.

A plugin's ``Config`` subclasses its kind's base, so that one dataclass is schema, default and documentation of an
option. The string under a field is its help; ``ftcore plugins`` and the docs read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Memory(Enum):
    """Who pays for activations: memory or recomputation. Nothing else in ftcore recomputes."""

    off = "off"
    auto = "auto"
    least = "least"
    offload = "offload"


class Graphs(Enum):
    """Whether launches of small models are recorded as CUDA graphs and replayed."""

    auto = "auto"
    off = "off"


class Optimizer(Enum):
    """Optimizers by the names transformers uses."""

    adamw_torch = "adamw_torch"
    adamw_torch_fused = "adamw_torch_fused"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    sgd = "sgd"


class BadRows(Enum):
    """What a bad row does to a run."""

    stop = "stop"
    quarantine = "quarantine"


@dataclass
class PluginConfig:
    """What every option has."""

    name: str = ""
    """The option that was selected; set by ftcore, not by hand."""


@dataclass
class ModelConfig(PluginConfig):
    """Base of all model families."""

    id: str = ""
    """Checkpoint id on the Hugging Face hub."""
    path: str | None = None
    """Local checkpoint folder; wins over `id`."""
    tiny: bool = False
    """Use the family's tiny random model and a byte-level tokenizer: nothing is downloaded."""
    shape: str | None = None
    """Random weights of a real size that the family declares, for measuring."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`, or `auto`: bfloat16, float16 on older GPUs, float32 on a CPU."""
    max_length: int | None = None
    """Context length that the model is prepared for, in tokens; null keeps the checkpoint's own."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the vocabulary."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """RoPE scaling as transformers' `rope_parameters` takes it; empty keeps the checkpoint's own, or takes YaRN where
    `max_length` is past its context."""
    revision: str | None = None
    """Branch, tag or commit of the hub checkpoint."""


@dataclass
class QuantizerConfig(PluginConfig):
    """Base of all quantizers; none selected means 16- or 32-bit weights."""


@dataclass
class KernelsConfig(PluginConfig):
    """Base of all kernel sets."""


@dataclass
class AdapterConfig(PluginConfig):
    """Base of all adapters."""


@dataclass
class DataConfig(PluginConfig):
    """Base of all data formats."""

    path: Any = None
    """File (.jsonl, .json, .csv, .tsv, .parquet, .txt), folder, or hub id, or a list of them to mix; null takes the
    format's shipped sample rows."""
    weights: list[float] = field(default_factory=list)
    """With a list of paths: how often each is drawn from, until one has no rows left; empty takes all rows of all."""
    split: str = "train"
    """Split to train on, where the data set has several."""
    subset: str | None = None
    """Part of a data set on the hub, where it has several."""
    eval_path: str | None = None
    """Held-out rows, in the same format."""
    eval_size: float = 0.0
    """Part of the rows held out when there is no `eval_path`: a fraction below 1, or a number of rows."""
    streaming: bool = False
    """Read rows as they are needed instead of all at once; needs `trainer.max_steps`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of yours by the names that the format reads: `data.columns.prompt=question`."""
    format: str | None = None
    """With `data=auto`: the format to use instead of detecting one."""
    template: str | None = None
    """Chat template: a .jinja file, or a name such as `chatml` or `qwen3_training`; null takes the tokenizer's own."""
    bad_rows: BadRows = BadRows.stop
    """What a bad row does: `stop` ends the run before any weight is read, `quarantine` puts up to 1 % of the rows aside
    and writes where they are and what is wrong with them to `bad_rows.jsonl` in the run folder."""
    min_trained: float = 0.01
    """Part of the tokens that must be trained for a run to begin; fewer mostly means that the wrong ones are masked."""
    allow_roots: list[str] = field(default_factory=list)
    """Further folders whose files rows may name; the folder of the rows and what is in it always counts."""
    allow_hosts: list[str] = field(default_factory=list)
    """Hosts whose images and recordings rows may name by http or https, such as `images.example.org`; no others."""


@dataclass
class TrainerConfig(PluginConfig):
    """Base of all trainers."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    max_steps: int = -1
    """Optimizer steps; -1 means `epochs` decides."""
    epochs: float = 1.0
    """Passes over the rows."""
    micro_batch: int = 0
    """Rows per forward pass; 0 takes the whole global batch, up to 8, and -1 what a forecast finds fastest on a GPU."""
    global_batch: int = 8
    """Rows per optimizer step of one process; gradient accumulation follows from it."""
    max_length: int = 1024
    """Longest row in tokens; the rest is cut off. `grpo`, `rloo` and `ppo` cut nothing: a forecast counts with it."""
    packing: bool = False
    """Fill each row of a batch with several documents."""
    optimizer: Optimizer = Optimizer.adamw_torch_fused
    """Optimizer name. `adamw_8bit` on a GPU with triton is ftcore's own kernel in bitsandbytes' format; else theirs."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the embedding and the head, where they are trained; null takes `learning_rate`."""
    loraplus_ratio: float = 1.0
    """LoRA+: the rate of LoRA's B matrices is so many times `learning_rate`, such as 16 (arXiv 2402.12354); 1 is plain
    LoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: float = 0.05
    """Part of the steps with a rising learning rate (below 1), or a number of steps."""
    schedule: str = "linear"
    """Learning-rate schedule, by transformers' name."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    seed: int = 42
    """Seed of weights, data order and sampling."""
    eval_steps: float = 0
    """Evaluate every so many steps (below 1: part of the run); 0 evaluates at the end only."""
    save_steps: float = 0
    """Save a checkpoint every so many steps (below 1: part of the run); 0 saves at the end only."""
    early_stopping: int = 0
    """Stop after so many evaluations without a better loss, or reward where that is learnt; 0 never stops early."""
    logging_steps: int = 1
    """Write metrics every so many steps."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that only the underlying trainer library knows, by its own names."""


@dataclass
class GeneratorConfig(PluginConfig):
    """Base of all generators: who writes completions to learn from, and answers."""


@dataclass
class RewardConfig(PluginConfig):
    """Base of all rewards."""

    weight: float = 1.0
    """Factor of this reward in the sum."""


@dataclass
class ExportConfig(PluginConfig):
    """Base of all export targets."""


@dataclass
class ReadBackConfig(ExportConfig):
    """Base of those export targets whose artifact is loaded in its consumer once it is written."""

    verify: bool = True
    """Load the artifact in its consumer, where that is installed, and compare it with the trained model."""


@dataclass
class ExtraConfig(PluginConfig):
    """Base of all extras: callbacks, trackers, observers."""


@dataclass
class PatchingConfig:
    """How conflicts between kernels are settled."""

    prefer: dict[str, str] = field(default_factory=dict)
    """Role to kernel set, where two selected sets offer a kernel for one role: `patching.prefer.rms_norm=triton`."""


@dataclass
class SamplingConfig:
    """How answers are written for `prompts` and `ftcore chat`."""

    max_new_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 answers greedily."""
    top_p: float = 1.0
    """Nucleus size when sampling."""
    system: str | None = None
    """System message put before each prompt."""


@dataclass
class ScoringConfig:
    """How rewards are called."""

    weights: list[float] = field(default_factory=list)
    """A factor for each of `rewards`; empty takes 1. A reward plugin has `reward.NAME.weight`."""
    time_limit: float = 30.0
    """Seconds that one call of a reward may take; 0 for no limit."""
    default: float | None = 0.0
    """Value of a completion whose reward raised or took too long; null ends the run instead."""


@dataclass
class PreviewConfig:
    """What `ftcore preview` shows."""

    rows: int = 3
    """How many rows are rendered."""
    eval: bool = False
    """Show the held-out rows instead of the training rows."""


@dataclass
class ResumeConfig:
    """How an interrupted run goes on; `resume=last` is short for `resume.checkpoint=last`."""

    checkpoint: str | None = None
    """`last` for the newest good checkpoint in `output_dir`, or a checkpoint folder. Null: the command line goes on by
    itself with an interrupted run of the same command. `never` starts anew."""
    allow: list[str] = field(default_factory=list)
    """Keys that may be other than they were when the run began, such as `trainer.learning_rate` or `data.path`."""


@dataclass
class RunConfig:
    """One run. `+kind=option` fills the kinds; every other key is written `key=value`."""

    model: ModelConfig | None = None
    """Model family."""
    quantizer: QuantizerConfig | None = None
    """How the frozen weights are compressed."""
    kernels: dict[str, KernelsConfig] = field(default_factory=dict)
    """Kernel sets; `kernels=[]` is plain transformers."""
    adapter: AdapterConfig | None = None
    """What is trained: LoRA or all weights."""
    data: DataConfig | None = None
    """How raw rows are read."""
    trainer: TrainerConfig | None = None
    """Training method."""
    generator: GeneratorConfig | None = None
    """Who writes completions to learn from, the answers to `prompts`, and those of `ftcore chat`."""
    reward: dict[str, RewardConfig] = field(default_factory=dict)
    """Reward functions."""
    export: dict[str, ExportConfig] = field(default_factory=dict)
    """Export targets."""
    extra: dict[str, ExtraConfig] = field(default_factory=dict)
    """Callbacks, trackers, observers."""

    memory: Memory = Memory.auto
    """Who pays for activations: `off` nobody, `least` every layer is recomputed, `offload` and its input waits in host
    memory, `auto` does of both what the GPU's memory asks for."""
    memory_limit: float | None = None
    """GiB of GPU memory that `memory=auto` plans with; null takes what is free."""
    gpu_memory: float | None = None
    """GiB of a GPU for which `ftcore plan` says what fits; null takes that of `gpu`, or this machine's, if there is
    one."""
    gpu: str | None = None
    """GPU for which `ftcore plan` says how long a step takes, such as `L4` or `"RTX 4090"`; null takes this machine's,
    or one with `gpu_memory`."""
    host_memory: float | None = None
    """GiB of host memory with which `ftcore plan` counts; null takes what this machine has."""
    graphs: Graphs = Graphs.auto
    """Record the layers' launches as CUDA graphs where they take longer than the work (`auto`), or never (`off`)."""
    rewards: list[str] = field(default_factory=list)
    """Reward functions of your own: `rewards=[my_rewards.py:length]`."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How rewards are called."""
    plugins: list[str] = field(default_factory=list)
    """Hooks of your own, by file or module: `plugins=[my_hooks.py]`; they win over the selected plugins."""
    patching: PatchingConfig = field(default_factory=PatchingConfig)
    """How conflicts between kernels are settled."""
    prompts: list[str] = field(default_factory=list)
    """Prompts answered before and after training; empty takes those of the shipped sample rows."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are written for `prompts` and `ftcore chat`."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """What `ftcore preview` shows."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """How an interrupted run goes on; `resume=last` is short for `resume.checkpoint=last`."""
    output_dir: str | None = None
    """Run folder; null makes a new one under `runs/`."""
    gguf: str | None = None
    """GGUF file that `ftcore chat` talks with, through llama.cpp."""
    run: str | None = None
    """Run folder whose recorded config is the base: for `ftcore export`, `chat`, `eval`, `plan` and `preview`."""
    objective: str = "eval_loss"
    """Metric that a sweep minimises or maximises."""


KINDS: dict[str, type[PluginConfig]] = {
    "model": ModelConfig,
    "quantizer": QuantizerConfig,
    "kernels": KernelsConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "trainer": TrainerConfig,
    "generator": GeneratorConfig,
    "reward": RewardConfig,
    "export": ExportConfig,
    "extra": ExtraConfig,
}
"""Kind to base class, in the order in which selected plugins are registered."""

MANY = frozenset({"kernels", "reward", "export", "extra"})
"""Kinds of which several options may be selected at once."""

DEFAULTED = frozenset({"kernels", "adapter", "data", "generator"})
"""Kinds that `ftcore.yaml` selects an option of: replaced without `+`."""
