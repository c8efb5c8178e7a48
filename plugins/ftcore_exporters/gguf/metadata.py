"""What a GGUF file says of itself, and its name, after the GGUF conventions (ggml's `docs/gguf.md`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from ftcore import Plan
from ftcore import checkpoint as sources
from ftcore_exporters._recorded import origin

if TYPE_CHECKING:
    from transformers import GenerationConfig

VERSION = "v1.0"
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""transformers' names of settings to those in `general.sampling.*`."""


@dataclass(frozen=True)
class Names:
    """What a model is called."""

    base: str
    """The base model's name, without its owner."""
    owner: str | None
    """Who published the base model on the hub."""
    basename: str
    finetune: str

    def file(self, size_label: str, kind: str, lora: bool = False) -> str:
        """`BaseName-SizeLabel-FineTune-v1.0-Encoding.gguf`, in the characters that the convention allows."""
        parts = [plain(self.basename), size_label, plain(self.finetune), VERSION, kind.upper()]
        return "-".join([*parts, "LoRA"] if lora else parts) + ".gguf"

    def mmproj(self, size_label: str, kind: str) -> str:
        """The name of the file beside it that reads images: llama.cpp finds it by its beginning."""
        return f"mmproj-{self.file(size_label, kind)}"


def names_of(plan: Plan, finetune: str | None, parameters: int) -> Names:
    """The names of a run's model.

    :param finetune: What this fine-tune is called; None takes the run folder's name.
    :param parameters: Of the model, to tell sizes from other numbers in its name.
    """
    model = origin(plan)
    source = sources.find(model, plan.family)
    if source.kind == "path":
        published = Path(source.name).resolve().name
    else:
        published = f"{model.name}-{source.name}" if source.kind == "random" else model.id
    name, owner, basename, *_ = gguf.Metadata.get_model_id_components(published, parameters)
    if source.kind not in ("hub", "package"):
        owner = None
    return Names(name or published, owner, basename or name or published, finetune or plan.output_dir.resolve().name)


def plain(text: str) -> str:
    """A part of a file name: letters, digits and dashes; no part after a dash is like `4k`, which would be a size."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "model"
    return re.sub(r"-(?=\d+[A-Za-z])", "", words)


def add_metadata(writer: gguf.GGUFWriter, plan: Plan, names: Names, size_label: str, kind: gguf.LlamaFileType) -> None:
    """Name, origin, size and type: `general.*`."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{names.base} {names.finetune}")
    writer.add_basename(names.basename)
    writer.add_finetune(names.finetune)
    writer.add_version(VERSION)
    writer.add_size_label(size_label)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, names.base)
    if names.owner:
        writer.add_base_model_organization(0, names.owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{names.owner}/{names.base}")
    if found := _license(plan):
        writer.add_license(found)


def add_sampling(writer: gguf.GGUFWriter, plan: Plan, generation: GenerationConfig | None) -> None:
    """Settings for sampling: the checkpoint's, or where it has none those that the family's authors recommend."""
    stored: dict[str, Any] = generation.to_diff_dict() if generation is not None else {}
    if not stored.get("do_sample") or not SAMPLING.keys() & stored.keys():
        stored = dict(next(iter(plan.family.sampling.values()), {}))
    for name, key in SAMPLING.items():
        if stored.get(name) is not None:
            add = getattr(writer, f"add_sampling_{key}")
            add(int(stored[name]) if name == "top_k" else float(stored[name]))


def _license(plan: Plan) -> str | None:
    """The base model's licence by its card, where that is on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    model = origin(plan)
    source = sources.find(model, plan.family)
    card: Any = Path(source.name) / "README.md" if source.kind == "path" else None
    if source.kind == "hub":
        card = try_to_load_from_cache(model.id, "README.md", revision=model.revision)
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    found = (metadata_load(card) or {}).get("license")
    return found if isinstance(found, str) else None
