"""The sides, each in a process of its own: a model, its cap, and the steps."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepbench import processes, sides
from stepbench.loop import GIB

from contextbench import folder
from contextbench.ballast import ballast, held, stack
from contextbench.stepping import stepped
from contextbench.works import ContextWork

Result = dict[str, Any]


def inner(side: str) -> None:
    """The inner form of `long_context.py`; `plan` makes the checkpoint folder and the forecasts."""

    def run(text: str) -> Result:
        given = json.loads(text)
        work = ContextWork(**given["work"])
        if side == "plan":
            given.pop("work")
            return {"status": "ok", "made": folder.locate(work), **folder.forecasts(work, **given)}
        return {**one(side, work), "versions": sides.versions()}

    processes.answer(lambda: None if side == "plan" else sides.imports(side), run)


def one(side: str, work: ContextWork) -> Result:
    """What was measured; `status` is `memory` where the GPU's was not enough."""
    import torch

    if work.device == "cuda" and work.gib:
        torch.cuda.set_per_process_memory_fraction(work.gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    try:
        return {"status": "ok", **SIDES[side](work)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"status": "memory", "detail": str(error).partition("\n")[0][:300]}


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the GPU's memory was the reason, also of an error that another one was raised from."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _ftcore(work: ContextWork) -> Result:
    from stepbench.sides.ftcore import described, overrides

    from ftcore import hooks as h
    from ftcore import pipeline
    from ftcore.api import validated

    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = pipeline.prepare(validated([*overrides(work, scratch), *_limited(work), *_stretched(work)]))
        planned = _planned(work, hooks, plan)  # by the host memory that is there before the run
        loaded = pipeline.load(hooks, plan)
        optimizer = hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=loaded.model)
        found = _with_ballast(work, loaded.model, optimizer)
    return {**found, **described(work, loaded), **_host(work, loaded.model), **planned}


def _limited(work: ContextWork) -> list[str]:
    """The cap in ftcore's words, less the part that it would leave alone of a card of that size; `auto` asks."""
    from ftcore.planner import GIVEN_AWAY

    return [f"memory_limit={work.gib * (1 - GIVEN_AWAY)}"] if work.gib and work.memory == "auto" else []


def _stretched(work: ContextWork) -> list[str]:
    """The words that a row past the checkpoint's own context takes."""
    config = json.loads((Path(work.folder) / "config.json").read_text(encoding="utf-8"))
    own = {**config, **config.get("text_config", {})}["max_position_embeddings"]
    if work.length <= own:
        return []
    scaling = f"{{rope_type: yarn, factor: {math.ceil(work.length / own)}}}"
    return [f"model.max_length={work.length}", f"model.rope_scaling={scaling}"]


def _with_ballast(work: ContextWork, model: Any, optimizer: Any = None) -> Result:
    """The steps, beside the memory of the layers that are not there."""
    cut = 0 < work.depth < work.layers
    kept = ballast(model, work.layers) if cut else []
    found = {"ballast_gib": sum(tensor.numel() for tensor in kept) / GIB, "depth": len(stack(model))}
    if cut:
        found["layer_mib"] = held(stack(model)[-1]) / 2**20
    return {**found, **stepped(work, model, optimizer)}


def _host(work: ContextWork, model: Any) -> Result:
    """What is held in host memory for the GPU: inputs of layers, and weights."""
    from ftcore_kernels.layers.decoder.host import host_of
    from ftcore_kernels.layers.host_weights import HOST

    if work.device != "cuda":
        return {"booked_gib": 0.0}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    gone = [module.weight for module in model.modules() if hasattr(module, HOST)]
    weights = sum(weight.numel() * weight.element_size() for weight in gone)
    return {"booked_gib": (sum(host_of(device).booked for device in devices) + weights) / GIB}


def _planned(work: ContextWork, hooks: Any, plan: Any) -> Result:
    """What the forecast says of the model that was run: the GPU's peak without the ballast, and the host's part."""
    from ftcore.config import Memory
    from ftcore.forecast import ENDLESS, Forecast, free
    from ftcore.meta_model import on_meta

    found = Forecast.of(plan, on_meta(hooks, plan)[0])
    assert isinstance(found, Forecast), found
    gib = work.gib or (plan.device.memory / GIB if plan.device.kind == "cuda" else 0)
    what = Memory(work.memory), 1, work.length, free(gib) if gib else ENDLESS
    return {"planned_peak_gib": found.peak(*what) / GIB, "planned_host_gib": found.host(*what) / GIB}


def _unsloth(work: ContextWork) -> Result:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # it writes unsloth_compiled_cache/ where it runs
        import unsloth  # before transformers and peft, which it patches  # noqa: F401
        from stepbench.sides.unsloth import load

        found = _with_ballast(work, load(work))
        os.chdir("/")
    return found


def _hf(work: ContextWork) -> Result:
    from stepbench.sides import hf

    return _with_ballast(work, hf.adapted(work, hf.base(work)))


SIDES: dict[str, Callable[[ContextWork], Result]] = {"hf": _hf, "unsloth": _unsloth, "ftcore": _ftcore}
