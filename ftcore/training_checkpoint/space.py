"""How much a run will write, asked before its first step; and what is done when the disk is full all the same."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftcore.catalog import installed
from ftcore.disk import need_space, shortage
from ftcore.errors import Exit, Problem, Refused
from ftcore.report import note, size
from ftcore.specs import Plan
from ftcore.training_checkpoint.store import all_of, newest_valid

BITS = "BITS_PER_WEIGHT"
"""Constant of an exporter's module: what it writes for each weight of the model; 16 where it does not say."""


def need_room(plan: Plan, trainer: Any) -> None:
    """The checkpoints that are kept and one more, the trained weights and the exports fit on the disk.

    Raises Refused when they do not. Checkpoints that are there already, of a run that goes on, are not counted twice.
    """
    folder = Path(trainer.args.output_dir)
    one = checkpoint_bytes(trainer)
    count = max(kept(trainer) + 1 - len(all_of(folder)), 1)
    others = weight_bytes(trainer.model) + export_bytes(plan, trainer.model)
    what = f"{count} checkpoints of {size(one)}, with {size(others)} of trained weights and exports,"
    fix = "free some space, keep fewer with trainer.args.save_total_limit=1, or set output_dir to another disk"
    need_space(folder, count * one + others, f"this run, with {what}", fix)


def checkpoint_bytes(trainer: Any) -> int:
    """Bytes of a checkpoint: the weights that it holds, and the optimizer's two moments of each that is trained."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    eight_bits = "8bit" in str(getattr(trainer.args, "optim", "")).lower()
    moments = sum(2 * p.numel() * (1 if eight_bits else p.element_size()) for p in trained)
    return weight_bytes(trainer.model) + int(moments)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that are saved: the adapter's where there is one, else all."""
    adapted = hasattr(model, "peft_config")
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapted)


def export_bytes(plan: Plan, model: Any) -> int:
    """Bytes of the chosen exports, as far as their plugins say."""
    count = model.num_parameters() if hasattr(model, "num_parameters") else sum(p.numel() for p in model.parameters())
    modules = (installed().find("export", name).load() for name in plan.run.export)
    return int(sum(getattr(module, BITS, 16) * count / 8 for module in modules))


def kept(trainer: Any) -> int:
    """Checkpoints that are there at the end; at least 1, which is written when the run is told to stop."""
    args = trainer.args
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return 1
    steps = args.max_steps
    if steps <= 0:  # a number of passes
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(len(trainer.train_dataset) / rows * args.num_train_epochs)
    every = math.ceil(args.save_steps * steps) if args.save_steps < 1 else int(args.save_steps)
    saves: int = math.ceil(steps / max(every, 1))
    return max(min(saves, int(args.save_total_limit or saves)), 1)


def saved(target: Path, save: Callable[[], None], spared: Path | None) -> None:
    """Save a checkpoint; where the disk is full, delete all older ones but the newest good one, and try once more.

    :param spared: a checkpoint that stays in any case, such as the best so far.

    Raises Refused when there is no room even so. Neither leaves a part of a checkpoint behind.
    """
    try:
        save()
    except Exception as error:
        said = shortage(error)
        if said is None:
            raise
        newest = newest_valid(target.parent)
        old = [path for path in all_of(target.parent) if path not in (newest, spared, target)]
        if not old or "too large" in said:
            raise _full(target, said, newest) from error
        for path in old:
            shutil.rmtree(path)
        note(f"{target} was not written ({said}): {', '.join(path.name for path in old)} deleted to try again")
        try:
            save()
        except Exception as again:
            if (said := shortage(again)) is None:
                raise
            raise _full(target, said, newest) from again


def _full(target: Path, said: str, newest: Path | None) -> Refused:
    good = f"the last good checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
    fix = "free some space, then run the same command again: it goes on from there"
    return Refused(Problem("output_dir", f"{target} cannot be written: {said}; {good}", fix, Exit.IO))
