"""Where a model's weights come from: a folder, a package, a tiny random model, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import gguf_tokenizer, unsafe_weights
from ftcore.config import ModelConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.paths import cache_dir, whole_folder
from ftcore.report import note
from ftcore.specs import Bundle, ModelFamily

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Source:
    """One place to load from."""

    kind: str
    """`path`, `package`, `random` or `hub`."""
    name: str
    """Folder, file in the package, name of the random shape, or hub id."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


def find(model: ModelConfig, family: ModelFamily) -> Source:
    """Decide where the weights come from; reads no weights and asks no network."""
    if model.path:
        return Source("path", model.path)
    if model.tiny or model.shape:
        return Source("random", model.shape or "tiny")
    if family.bundle and model.id == type(model)().id and (file := bundled_file(family.bundle)):
        return Source("package", str(file))
    return Source("hub", model.id)


def bundled_file(bundle: Bundle) -> Path | None:
    """The bundle's file, found without importing its package, whose own dependencies may be missing."""
    spec = importlib.util.find_spec(bundle.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / bundle.file).is_file():
            return file
    return None


def problems(model: ModelConfig, family: ModelFamily) -> list[Problem]:
    """What is wrong with the source, found without torch."""
    if model.tiny and model.shape:
        return [Problem("model.tiny", "model.tiny and model.shape are both set", "keep one of them")]
    if model.path and (model.tiny or model.shape):
        key = "model.tiny" if model.tiny else "model.shape"
        return [Problem("model.path", f"model.path and {key} are both set", "keep one of them")]
    if model.shape and model.shape not in family.shapes:
        known = ", ".join(family.shapes) or "none"
        return [Problem("model.shape", f"{model.name} declares no shape '{model.shape}'", f"its shapes: {known}")]
    source = find(model, family)
    if source.kind == "hub" and (".." in model.id or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model.id)):
        return [Problem("model.id", f"'{model.id}' is no hub id", "write owner/name, or set model.path for a folder")]
    if source.kind == "package" and importlib.util.find_spec("gguf") is None:
        return [Problem("model", f"{Path(source.name).name} needs the package gguf", "pip install 'ftcore[gguf]'")]
    if source.kind == "path" and not (Path(source.name) / "config.json").is_file():
        place = Path(source.name)
        what = "holds no config.json" if place.is_dir() else "is a file" if place.is_file() else "does not exist"
        return [Problem("model.path", f"{source.name} {what}", "give a checkpoint folder", Exit.MISSING_INPUT)]
    if source.kind == "hub" and (problem := _hub_problem(model, family)):
        return [problem]
    try:
        config = read_config(model, family)
    except Refused as refused:
        return list(refused.problems)
    if source.kind == "path" and (problem := unsafe_weights.problem("model.path", Path(source.name))):
        return [problem]
    found = config.get("model_type") if config else None
    if found and found not in family.model_types:
        from ftcore.coverage import families_for

        message = f"{source.name} is a '{found}' checkpoint, but {model.name} takes {', '.join(family.model_types)}"
        names = families_for(found)
        none = f"no installed family takes '{found}'; `ftcore new model/{found}` starts one"
        return [Problem("model", message, f"use +model={names[0]}" if names else none)]
    return []


def read_config(model: ModelConfig, family: ModelFamily) -> dict[str, Any] | None:
    """The checkpoint's config.json as it stands; None where there is none on this machine."""
    source = find(model, family)
    file: str | Path | None = None
    if source.kind == "path":
        file = Path(source.name) / "config.json"
    elif source.kind == "hub":
        file = _cached_config(model)
    if file is None or not Path(file).is_file():
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused(
            Problem(str(file), f"is not JSON: {error}", "the checkpoint is damaged; get it again", Exit.DATA)
        ) from error
    if not isinstance(config, dict):
        raise Refused(Problem(str(file), "holds no object", "the checkpoint is damaged; get it again", Exit.DATA))
    return config


def settings(model: ModelConfig, family: ModelFamily) -> dict[str, Any]:
    """The config's keys that are known without transformers, those of its text part in front.

    Defaults are not among them; empty where the config is not on this machine. Raises Refused for a config that cannot
    be read, KeyError for a shape that the family does not declare.
    """
    source = find(model, family)
    if source.kind == "random":
        config: Any = family.tiny if source.name == "tiny" else family.shapes[source.name]
    elif source.kind == "package":
        config = next(iter(family.shapes.values()))
    else:
        config = read_config(model, family) or {}
    return {**config, **config.get("text_config", {})}


def context_length(model: ModelConfig, family: ModelFamily) -> int | None:
    """Longest row in tokens that the checkpoint was made for; None where its config is not on this machine."""
    length = settings(model, family).get("max_position_embeddings")
    return int(length) if length else None


def _cached_config(model: ModelConfig) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.id, "config.json", revision=model.revision)
    except HFValidationError:  # no id: `problems` says so
        return None
    return found if isinstance(found, str) else None


def _hub_problem(model: ModelConfig, family: ModelFamily) -> Problem | None:
    if _cached_config(model):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    offer = family.bundle.install if family.bundle and model.id == type(model)().id else ""
    fix = offer or "set model.path to a checkpoint folder, or try the command with model.tiny=true"
    try:
        hf_hub_download(model.id, "config.json", revision=model.revision, etag_timeout=5)
    except GatedRepoError:
        return Problem(
            "model.id",
            f"{model.id} asks for its licence to be accepted",
            "accept it on the hub, then `hf auth login`",
            Exit.MISSING_INPUT,
        )
    except RepositoryNotFoundError:
        return Problem(
            "model.id",
            f"the hub has no model '{model.id}'",
            "check the id, or log in with `hf auth login`",
            Exit.MISSING_INPUT,
        )
    except Exception as error:  # whatever the network does: name it and offer the way out
        if offer:
            message = f"its weights are not installed and {model.id} cannot be reached ({type(error).__name__})"
        else:
            message = f"{model.id} is not on this machine and the hub cannot be reached ({type(error).__name__})"
        return Problem("model", message, fix, Exit.MISSING_INPUT)
    return None


def locate(model: ModelConfig, family: ModelFamily) -> str:
    """Folder or hub id that transformers' `from_pretrained` takes; makes tiny models and dequantizes packages once."""
    source = find(model, family)
    if source.kind == "random":
        return str(_random_checkpoint(family, source.name))
    if source.kind == "package":
        return str(_dequantized(Path(source.name), family))
    return source.name


def config_of(model: ModelConfig, family: ModelFamily) -> PretrainedConfig:
    """The transformers config, without reading weights: enough for a model on the meta device."""
    from transformers import AutoConfig

    source = find(model, family)
    if source.kind == "random":
        return _random_config(family, source.name)
    if source.kind == "package":
        # Parsing the GGUF's vocabulary takes seconds; the family knows the shape of what it bundles.
        return _random_config(family, next(iter(family.shapes)))
    return AutoConfig.from_pretrained(source.name, revision=model.revision, trust_remote_code=False, **family.settings)


def _random_config(family: ModelFamily, shape: str) -> PretrainedConfig:
    from transformers import AutoConfig

    arguments = family.tiny if shape == "tiny" else family.shapes[shape]
    return AutoConfig.for_model(family.model_types[0], **arguments, **family.settings)


def _random_checkpoint(family: ModelFamily, shape: str) -> Path:
    """A checkpoint folder with random weights and a byte-level tokenizer: the same loading path as a real model."""
    import torch
    import transformers

    from ftcore import vision
    from ftcore.bytes_tokenizer import byte_tokenizer

    config = _random_config(family, shape)
    made_of = [config.to_json_string(), transformers.__version__, family.auto_class, family.chat_template or ""]
    made_of += [repr(family.vision)] if family.vision else []
    made_of += family.tokens
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    target = cache_dir() / "random" / f"{family.model_types[0]}-{shape}-{key}"
    if not (target / "config.json").is_file():
        tokenizer = byte_tokenizer(family.chat_template, family.tokens)
        if family.vision:
            vision.attach_tiny(tokenizer, family.vision)
        config.pad_token_id, config.eos_token_id, config.bos_token_id = (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
            None,
        )
        # Real sizes are made in 16 bits and, where there is a GPU, on it: on a CPU that takes minutes.
        dtype = torch.float32 if shape == "tiny" else torch.bfloat16
        place = "cuda" if shape != "tiny" and torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng(), torch.device(place):
            torch.manual_seed(0)
            model = getattr(transformers, family.auto_class).from_config(config, dtype=dtype)
            if family.vision:
                vision.open_gates(model)
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target


TOKENIZER = 2
"""Counts up when tokenizers are read from GGUF files in another way, so that what was read before is read again."""


def _dequantized(file: Path, family: ModelFamily) -> Path:
    """The package's GGUF as float32 safetensors, written once into the cache."""
    import torch
    import transformers
    from transformers import AutoTokenizer, GgufConfig

    stat = file.stat()
    made_of = f"{file.name}:{stat.st_size}:{transformers.__version__}:{TOKENIZER}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    target = cache_dir() / "dequantized" / f"{file.stem}-{key}"
    if not (target / "config.json").is_file():
        note(f"dequantizing {file.name}, once: {target}")
        # Without `dequantize` the model keeps a quantizer that can neither be trained nor saved.
        auto = getattr(transformers, family.auto_class)
        model = auto.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        gguf_tokenizer.mend(tokenizer, file)
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return target
