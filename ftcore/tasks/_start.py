"""A run's model as training found it, and the change to what was trained, without loading frozen weights again."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ftcore import hooks as h
from ftcore.config import PluginConfig, RunConfig
from ftcore.drift import of_rows
from ftcore.errors import Exit, Problem, Refused, refuse
from ftcore.manager import Hooks
from ftcore.record import TRAINED
from ftcore.run_state import read_run
from ftcore.specs import Plan
from ftcore.tasks._config import config_of


def check_start(now: RunConfig, argv: list[str]) -> None:
    """Raises Refused for what would not be the start of this run, or would be rows that it was trained on."""
    then = config_of([word for word in argv if word.lstrip("+").startswith("run=")])
    problems = []
    for kind in ("model", "adapter"):
        problems += _changed(kind, getattr(then, kind), getattr(now, kind))
    data = now.data
    assert data is not None and then.data is not None and now.trainer is not None and then.trainer is not None
    other = data.eval_size != then.data.eval_size
    if (data.path is not None or other) and not data.eval_path and data.eval_size:
        key = "data.eval_size" if other else "trainer.seed" if now.trainer.seed != then.trainer.seed else ""
        if key:
            message = "would hold out rows that the run was trained on"
            problems.append(Problem(key, message, "leave it out, or name rows of their own: data.eval_path=held.jsonl"))
        elif data.path == then.data.path and _other_rows(now):
            message = "is not what it was when the run was trained: rows that it was trained on would be held out"
            problems.append(Problem("data.path", message, "name rows of their own: data.eval_path=held.jsonl"))
    refuse(problems)


def _other_rows(config: RunConfig) -> bool:
    """Whether the data files that the run read are others by now."""
    assert config.data is not None and config.run is not None
    known = ((read_run(Path(config.run)) or {}).get("inputs") or {}).get("data.path")
    now = of_rows(config.data.path, "data.path")
    return known is not None and now is not None and now != known


def _changed(kind: str, then: PluginConfig | None, now: PluginConfig | None) -> list[Problem]:
    """Settings without which the trained weights do not fit. Where the start is found may have changed."""
    old, new = ({} if one is None else asdict(one) for one in (then, now))
    if old.get("name") != new.get("name"):
        return [Problem(kind, f"was {old.get('name')} when the run was trained", f"leave {kind}= out")]
    keys = [key for key in new if key != "path"] if kind == "adapter" else ["tiny", "shape", "new_tokens"]
    return [
        Problem(f"{kind}.{key}", f"was {_plain(old[key])} when the run was trained", "leave it out")
        for key in keys
        if old[key] != new[key]
    ]


def _plain(value: object) -> object:
    return getattr(value, "value", value)


def put_in_trained(hooks: Hooks, plan: Plan, model: Any, run: Path) -> None:
    """Give the start of a run the weights that it trained: those of its adapter, or all of them.

    In place, so that what a trainer keeps of the start, such as a reference model, stays what it was in the run.
    Raises Refused where they do not fit.
    """
    folder = run / TRAINED
    try:
        if (folder / "adapter_config.json").is_file():
            fits = _adapter(model, folder)
        else:
            fits = _all(hooks, plan, model, folder)
    except RuntimeError as error:  # PyTorch's word for tensors of other shapes and names
        if "state_dict" not in str(error):
            raise
        fits = False
    if not fits:
        message = f"the weights in {folder} are not those of the model that the run's config makes"
        raise Refused(Problem("run", message, "leave model.* and adapter.* as they were", Exit.DATA))


def _adapter(model: Any, folder: Path) -> bool:
    found = model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    return not (found.missing_keys or found.unexpected_keys)


def _all(hooks: Hooks, plan: Plan, model: Any, folder: Path) -> bool:
    """Through transformers once more, which knows in what form it saves weights of each kind."""
    assert plan.run.model is not None
    source = replace(plan.run.model, path=str(folder), tiny=False, shape=None)
    there = replace(plan, run=replace(plan.run, model=source))
    trained = hooks.first(h.ftcore_load_model, plan=there, quantization=None)
    model.load_state_dict(trained.state_dict())
    return True
