"""Merged weights packed by bitsandbytes, as transformers saves and loads them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcore import Artifact, Checkpoint, Plan, Problem
from ftcore.disk import need_space
from ftcore.paths import whole_folder
from ftcore_exporters._merging import unmergeable
from ftcore_exporters._read_back import careful


def problems(plan: Plan, name: str) -> list[Problem]:
    """Why bitsandbytes cannot pack the plan's model."""
    return [*unmergeable(plan), *_experts(plan, name)]


def _experts(plan: Plan, name: str) -> Iterator[Problem]:
    if any("experts" in parameter for parameter in plan.family.lora_parameters):
        message = f"{name} packs linear layers alone, and transformers holds this family's experts in other tensors"
        yield Problem("export", message, "use '+export=[fp8]' or '+export=[int4]'")


def export(checkpoint: Checkpoint, target: str, settings: Any, note: str, verify: bool) -> Artifact:
    """Write `export/<target>`: the merged 16-bit model, packed while it is loaded, and saved so.

    :param settings: transformers' `BitsAndBytesConfig`.
    """
    import transformers

    from ftcore_exporters._serving import generation_settings

    plan = checkpoint.plan
    folder = plan.output_dir / "export" / target
    loader = getattr(transformers, plan.family.auto_class)
    model = loader.from_pretrained(
        checkpoint.merged(), dtype="auto", quantization_config=settings, trust_remote_code=False, **_place(plan)
    )
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    need_space(folder, held, "the packed model")
    with whole_folder(folder) as work:
        model.save_pretrained(work)
        checkpoint.tokenizer.save_pretrained(work)
        generation_settings(checkpoint).save_pretrained(work)
    read = functools.partial(read_back, checkpoint, folder, model)
    checks = careful(checkpoint, "transformers", held, read) if verify else {}
    return Artifact.of(target, folder, note, checks)


def _place(plan: Plan) -> dict[str, Any]:
    return {"device_map": {"": "cuda:0" if plan.device.kind == "cuda" else "cpu"}}


def read_back(checkpoint: Checkpoint, folder: Path, packed: Any) -> dict[str, Any]:
    """Load the folder with transformers: it must hold bit for bit what was packed; then its logits are compared.

    :param packed: the model that was saved.
    """
    import torch
    import transformers

    from ftcore.agreement import REPORTED
    from ftcore_exporters._read_back import compared, joined

    plan = checkpoint.plan
    loader = getattr(transformers, plan.family.auto_class)
    model = loader.from_pretrained(folder, dtype="auto", trust_remote_code=False, **_place(plan)).eval()
    wanted, found = packed.state_dict(), model.state_dict()
    other = [n for n in wanted if n not in found or not torch.equal(found[n], wanted[n])]
    objection = f"{len(other)} tensors were read back otherwise, such as {other[0]}" if other else None
    return joined(compared(checkpoint, model, folder, "transformers", within=REPORTED), objection)
