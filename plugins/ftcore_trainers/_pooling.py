"""One embedding a text: the mean of its tokens' last hidden states, normalised (Reimers & Gurevych 2019, 1908.10084).

The hook stays when a trained model is loaded again, so that a later export says how the model pools as well.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Plan, checkpoint, hookimpl
from ftcore.companions import saved_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

POOLING = "1_Pooling"
PARTS = (("", "Transformer"), (POOLING, "Pooling"), ("2_Normalize", "Normalize"))
"""Folder and kind of each part of a sentence-transformers model."""


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the files by which sentence-transformers knows how to pool."""
    tokenizer = yield
    saved_with_pooling(plan, tokenizer)
    return tokenizer


def saved_with_pooling(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's `save_pretrained` say how the plan's model pools."""
    assert plan.run.model is not None
    size = checkpoint.config_of(plan.run.model, plan.family).get_text_config().hidden_size
    saved_beside(tokenizer, partial(write, size=size))


def write(folder: Path, size: int) -> None:
    """Write `modules.json` and the parts it names.

    :param size: Numbers in an embedding.
    """
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(PARTS)
    ]
    for path, _ in PARTS:
        (folder / path).mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    pooling = {"word_embedding_dimension": size, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / POOLING / "config.json").write_text(json.dumps(pooling, indent=2) + "\n", encoding="utf-8")


def folder_of(plan: Plan) -> Path | None:
    """Where a checkpoint says how it pools: its folder, or the hub's copy of that file; None where nothing is said."""
    from huggingface_hub import hf_hub_download

    model = plan.run.model
    assert model is not None
    source = checkpoint.find(model, plan.family)
    if source.kind == "path":
        return Path(source.name)
    if source.kind != "hub":
        return None
    try:
        file = hf_hub_download(model.id, f"{POOLING}/config.json", revision=model.revision, etag_timeout=5)
    except Exception:  # it has none, or the hub cannot be reached: the network's errors are many
        return None
    return Path(file).parent.parent


def other_pooling(folder: Path) -> str | None:
    """How a checkpoint folder says that it pools, if that is not by the mean."""
    file = folder / POOLING / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, on in settings.items() if name.startswith(prefix) and on]
    return ", ".join(modes) if modes and modes != ["mean_tokens"] else None


def embeddings(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors `[rows, size]` in float32 of a tokenized batch `[rows, length]`."""
    import torch

    states = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)
