"""The one owner of recomputation: what `memory=` means for a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftcore.config import Graphs, Memory, Optimizer
from ftcore.host_memory import available
from ftcore.planner import GIVEN_AWAY, Lean, Planner, for_recorded
from ftcore.report import note
from ftcore.specs import Leaving, Plan, Recomputing
from ftcore.store import Store

RESERVE = 0.8
"""Part of the free memory that activations of transformers' own layers may fill: their count is an estimate."""

ROUNDED_UP = 2**25
"""Bytes under a limit that are left alone: what the allocator rounds up, and tensors that nobody counted."""

HEAD = 2**27
"""Logits that the fused head has alive at a time, in fp32, and their gradient."""


STATE_READ = "ftcore_optimizer_state_read"
"""Attribute of a model whose optimizer has its state from a checkpoint."""

LEAN = (Memory.least, Memory.offload)
"""Every layer keeps its input only, or not even that, and works in tiles of rows."""


@dataclass(frozen=True)
class Applied:
    """What a model carries as `ftcore_memory`, for who has to say what fits it."""

    mode: Memory
    state: int = 8
    """Bytes of optimizer state for each trained parameter."""
    there: Callable[[], int] = available
    """Bytes of host memory that were there when it was first asked for: before any input was."""
    sequences: int = 1
    """Of a row of the data set: both answers of a pair are read at once."""


def apply(plan: Plan, model: Any) -> bool:
    """Do what `memory` asks for, on layers that choose what they keep and on others; returns whether any recomputes.

    Layers whose kernel recomputes by itself are told how much to keep; the others are checkpointed whole, if at all.
    """
    chosen = layers_that_choose(model)
    mode, there = plan.run.memory, functools.cache(available)
    passes = plan.trainer.passes if plan.trainer else None
    sequences = passes.sequences if passes else 1
    model.ftcore_memory = Applied(mode, optimizer_bytes(plan, trained_width(model)), there, sequences)
    on_gpu = plan.device.kind == "cuda"
    for layer in chosen:
        layer.width = width_of(plan.dtype)
    if chosen and mode in LEAN:
        free = room(plan, model, chosen) if on_gpu else _all_there_is
        host = partial(host_room, OFFLOADED, there) if mode is Memory.offload else _none
        Lean(chosen, free, host, _say, last=_least_of_last(model, chosen[-1])).attach()
        if mode is Memory.offload and plan.device.kind == "cuda":
            leave_in_host_memory(plan, model)
    elif chosen and mode is Memory.auto and on_gpu:
        Planner(chosen, room(plan, model, chosen), partial(host_room, HOST_PART, there), _say).attach()
    if plan.device.kind == "cuda" and plan.run.graphs is Graphs.auto:
        for before, layer in zip([None, *chosen], chosen, strict=False):
            layer.follow(before)
    recompute = wants_recompute(plan, model)
    if recompute and len(chosen) < _number_of_layers(model):
        # Non-reentrant: works with frozen inputs, and recomputes only what the backward pass asks for.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "ftcore_recompute"):
                module.gradient_checkpointing = False
    return recompute


def leave_in_host_memory(plan: Plan, model: Any) -> int:
    """Move the frozen embedding and head off the GPU, where kernels can work with that; returns their bytes.

    The head stays where a run writes completions: every token would fetch it.
    """
    import torch

    left = 0
    for weights in host_weights_of(model):
        head = weights.head()
        left += weights.leave(head=not writes(plan))
        if head is not None and weights.head() is None:
            model.ftcore_fetched = head.numel() * head.element_size()
    if left and plan.device.kind == "cuda":
        torch.cuda.empty_cache()
    return left


def host_weights_of(model: Any) -> list[Leaving]:
    """What the kernels of heads left on the models that they are in."""
    # Not `hasattr`: PEFT's wrappers answer for the model inside them.
    return [module.ftcore_host_weights for module in model.modules() if "ftcore_host_weights" in vars(module)]


def writes(plan: Plan) -> bool:
    """Whether the trainer learns from what the model writes."""
    trainer = plan.trainer
    return trainer is not None and bool(trainer.wants_rewards or (trainer.passes and trainer.passes.written))


def layers_that_choose(model: Any) -> list[Recomputing]:
    """What the kernels of whole layers left on their modules, in the model's order."""
    return [module.ftcore_recompute for module in model.modules() if hasattr(module, "ftcore_recompute")]


def _all_there_is(*_: object) -> int:
    return 2**62


def _none() -> int:
    return 0


def _say(rows: int, length: int, store: Store) -> None:
    kept = len(store.starts)
    where = f"{store.away} in host memory" if store.away else "on the GPU"
    note(
        f"memory: of {rows} x {length:,} tokens the inputs of {kept} of {store.layers} layers are kept ({where}); "
        "those of the others are made again in the backward"
    )


def _least_of_last(model: Any, layer: Recomputing) -> Callable[[int, int], int]:
    """What the last layer may keep at no cost: the head needs less memory than a layer's backward, which comes next."""

    def choose(rows: int, length: int) -> int:
        levels = layer.levels(rows, length)
        spare = layer.workspace(rows, length, True) - head_bytes(model, rows, length, layer.width)
        return max(index for index, level in enumerate(levels) if level.kept - levels[0].kept <= max(spare, 0))

    return choose


def width_of(dtype: str) -> int:
    """Bytes of an element of weights or activations that are loaded or computed in this dtype, by its name."""
    return 4 if dtype == "float32" else 2


def head_bytes(model: Any, rows: int, length: int, width: int = 2) -> int:
    """Bytes that the fused head needs for a while: a chunk of logits and its gradient, and the rows' gradients.

    And its weights, where they are on the GPU only then.

    :param width: Bytes of an element of the activations.
    """
    text = model.config.get_text_config()
    return (
        getattr(model, "ftcore_fetched", 0)
        + (4 + width) * min(HEAD, rows * length * int(text.vocab_size))
        + 3 * width * rows * length * int(text.hidden_size)
    )


def _number_of_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def room(plan: Plan, model: Any, layers: list[Recomputing]) -> Callable[[int, int, int, bool, bool], int]:
    """The planner's question: from rows, row length, plans made before, recording, and tiles, to activations' bytes."""
    limit, state = plan.run.memory_limit, optimizer_bytes(plan, trained_width(model))
    at_first: list[int] = []

    def fills(rows: int, length: int, made: int, recorded: bool, tiled: bool) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
        at_first.append(_allocated() - gradients)
        # Gradient accumulation may put any number of batches before the first optimizer step.
        there = at_first[-1] - at_first[0] >= 0.9 * state * sum(p.numel() for p in trained)
        there |= bool(vars(model).get(STATE_READ))
        return budget(model, layers, rows, length, 0 if there else state, recorded, limit, tiled)

    return fills


def budget(
    model: Any,
    layers: list[Recomputing],
    rows: int,
    length: int,
    state: int,
    recorded: bool,
    limit: float | None = None,
    tiled: bool = False,
) -> int:
    """Bytes of GPU memory that activations of a batch may fill, counted at the start of a forward pass.

    :param state: Bytes of optimizer state for each trained parameter that are still to come.
    :param recorded: Whether the layers' launches are recorded: then they do not share their memory with the head.
    :param limit: GiB that the process may take in all, if fewer than there are.
    :param tiled: Whether the layers work in tiles of rows.
    """
    import torch

    allocated = torch.cuda.memory_allocated() + (0 if recorded else of_graphs())
    there, total = torch.cuda.mem_get_info()
    free = there + torch.cuda.memory_reserved() - allocated
    if torch.cuda.is_available():  # what torch lets this process have
        free = min(free, int(torch.cuda.memory.get_per_process_memory_fraction() * total) - allocated)
    if limit is not None:
        free = min(free, int(limit * 2**30) - allocated)
    needs = (
        head_bytes(model, rows, length, layers[0].width),
        max(layer.workspace(rows, length, tiled) for layer in layers),
    )
    workspace = sum(needs) if recorded else max(needs)
    waiting = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and p.grad is None)
    waiting += state * sum(p.numel() for p in model.parameters() if p.requires_grad)
    spare = GIVEN_AWAY * free if limit is None else ROUNDED_UP
    left = int(free - spare) - workspace - int(waiting)
    return for_recorded(left, layers, rows, length) if recorded else left


def of_graphs() -> int:
    """Bytes that recorded launches hold although no tensor does: nobody else is given those."""
    import torch

    if not torch.cuda.is_available():
        return 0
    parts: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    pools = [part for part in parts if tuple(part["segment_pool_id"]) != (0, 0)]
    return int(sum(part["total_size"] - part["allocated_size"] for part in pools))


HOST_PART = 0.5
"""Part of the host's available memory that inputs of layers may fill: what is locked for a GPU cannot be swapped."""

OFFLOADED = 0.9
"""The same where it was asked for."""


def host_room(part: float, there: Callable[[], int] = available) -> int:
    """Bytes of host memory that inputs of layers may fill, in each of the host's processes.

    :param there: Bytes that the host has.
    """
    return int(part * there() / max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))


def _allocated() -> int:
    import torch

    return torch.cuda.memory_allocated()


def optimizer_bytes(plan: Plan, width: int) -> int:
    """Bytes of state that the optimizer keeps for each trained parameter: two moments, or none.

    :param width: Bytes of the parameter: PyTorch's moments are as wide.
    """
    optimizer = plan.run.trainer.optimizer if plan.run.trainer else Optimizer.adamw_torch
    return {Optimizer.sgd: 0, Optimizer.adamw_8bit: 2, Optimizer.paged_adamw_8bit: 2}.get(optimizer, 2 * width)


def trained_width(model: Any) -> int:
    """Bytes of a trained parameter, of the widest."""
    return max((p.element_size() for p in model.parameters() if p.requires_grad), default=4)


def wants_recompute(plan: Plan, model: Any) -> bool:
    """`least` and `offload` always, `off` never, `auto` when a micro-batch's activations would not fit the GPU."""
    if plan.run.memory is not Memory.auto:
        return plan.run.memory in LEAN
    if plan.device.kind != "cuda" or plan.run.trainer is None:
        return False
    return activation_bytes(plan, model.config) > RESERVE * plan.device.memory


def activation_bytes(plan: Plan, config: Any) -> int:
    """Bytes that one micro-batch of the longest rows keeps for its backward pass: an upper estimate.

    Without recomputation. Counted per token and layer from what transformers' decoder layers save: about 14 tensors of
    the hidden size and 5 of the intermediate size, and the logits with their float32 copy and gradient once.
    """
    text = config.get_text_config()
    width = width_of(plan.dtype)
    inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
    inner = inner if isinstance(inner, int) else max(inner)  # Gemma 3n has one for each layer
    layer = width * (14 * text.hidden_size + 5 * inner)
    head = text.vocab_size * (width + 8)
    assert plan.run.trainer is not None
    tokens = micro_batch(plan) * plan.run.trainer.max_length
    return int(tokens * (layer * text.num_hidden_layers + head))


def micro_batch(plan: Plan) -> int:
    """Rows per forward pass."""
    assert plan.run.trainer is not None
    trainer = plan.run.trainer
    if trainer.micro_batch > 0:
        return trainer.micro_batch
    return next(n for n in range(min(8, trainer.global_batch), 0, -1) if trainer.global_batch % n == 0)
