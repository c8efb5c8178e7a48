"""A whole decoder layer as one function: fewer passes over memory, and a choice of what is kept for the backward.

`install_*` bind it to a layer of transformers. A call that it does not compute, such as generation with a cache, goes
to the family's own forward.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ftcore import Plan, Role, bind
from ftcore_kernels.layers.decoder.attention import Mask, reading, taken, use
from ftcore_kernels.layers.decoder.function import Keeping, ends, run, trained
from ftcore_kernels.layers.decoder.heads import size
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.parts import Ops
from ftcore_kernels.layers.decoder.recompute import Recompute
from ftcore_kernels.layers.decoder.structure import ACTIVATIONS, Structure
from ftcore_kernels.layers.kv_cache import cache_in
from ftcore_kernels.layers.mlp import activation_name
from ftcore_kernels.layers.uncovered import Uncovered, say


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    *,
    structure: Structure,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: Mask | torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """hidden_states `[B, S, H]` -> the same shape and dtype."""
    recompute: Recompute = module.ftcore_recompute
    attention_mask = taken(attention_mask)
    keep = recompute.keep(hidden_states)
    graphs, key, kind, tables = None, (), (getattr(module.self_attn, "layer_type", None),), ()
    cached = cache_in(kwargs) is not None
    plain = not cached and position_embeddings is not None and not kwargs.get("output_attentions")
    plain = plain and kwargs.get("is_causal") is not False
    hooked = any(map(_has_foreign_hooks, structure.inner(module)))
    if plain and module.training and torch.is_grad_enabled() and not hooked:
        graphs = recompute.recording(hidden_states)
    if graphs is not None and (read := reading(attention_mask)).complete:
        documents = read.documents
        tables = (*position_embeddings, *(() if documents is None else documents.tables))
        key = (hidden_states.shape, hidden_states.dtype, hidden_states.requires_grad, keep, structure.state(module))
        key = (*key, None if documents is None else documents.bucket, *((one.shape, one.dtype) for one in tables))
        if (record := graphs.ready(key)) is not None:
            return graphs.replay(record, hidden_states, tables, kind)
    try:
        if cached or position_embeddings is None or kwargs.get("output_attentions"):
            raise Uncovered("a cache, no tables of angles, or attention weights asked for")
        if hooked:
            raise Uncovered("a module inside a layer has hooks")
        if torch.is_autocast_enabled(hidden_states.device.type) and hidden_states.dtype == torch.float32:
            raise Uncovered("autocast would round 32-bit hidden states")
        layer = structure.read(module, hidden_states, position_embeddings, attention_mask, kwargs)
    except Uncovered as reason:
        if module.training and torch.is_grad_enabled():
            say("decoder layers", str(reason))
        whole = dict(kwargs, position_embeddings=position_embeddings, attention_mask=attention_mask)
        return _own(module, hidden_states, keep, whole)
    if graphs is not None and tables and layer.attention.recordable and trained(layer) and graphs.due(key):
        record = graphs.record(key, layer, keep, kind, hidden_states.requires_grad)
        return graphs.replay(record, hidden_states, tables, kind)
    layer.tile, layer.group = recompute.tile(hidden_states), size(layer, recompute.group(hidden_states))
    inside = recompute.inside and not _foreign(module._forward_pre_hooks)
    host = recompute.host(hidden_states)
    out = run(layer, hidden_states, Keeping(keep, host, recompute.away, recompute.attended, inside))
    if _foreign(module._forward_hooks):
        ends(out)
    return out


def _foreign(hooks: dict[int, Any]) -> bool:
    """Whether there are hooks that may write to what passes by, unseen by autograd: transformers' own only collect."""
    return any(getattr(hook, "__module__", "").partition(".")[0] != "transformers" for hook in hooks.values())


def _has_foreign_hooks(module: Any) -> bool:
    """Whether somebody wants to be called where the layer passes the module by."""
    own = module.__dict__
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]):
        return False
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(_foreign(own[name]) for name in names)


def _own(module: Any, hidden_states: torch.Tensor, keep: Keep, kwargs: dict[str, Any]) -> torch.Tensor:
    """The family's forward, recomputed as a whole where something is."""
    out: torch.Tensor
    if keep is not Keep.ALL and torch.is_grad_enabled() and module.training:
        from torch.utils.checkpoint import checkpoint

        out = checkpoint(type(module).forward, module, hidden_states, use_reentrant=False, **kwargs)
    else:
        out = type(module).forward(module, hidden_states, **kwargs)
    return out


def fits(module: Any, role: Role, plan: Plan) -> str | None:
    """Why this layer cannot be the manual one in this run, or None. Asked before the adapter is there."""
    config = module.self_attn.config
    name = activation_name(module.mlp)
    if name not in ACTIVATIONS:
        return f"has no kernel for the activation {name or 'of this MLP'}"
    # Configs may name dropouts that their layers do not have.
    if getattr(config, "attention_dropout", 0.0) or any(isinstance(m, nn.Dropout) and m.p for m in module.children()):
        return "has no dropout"
    adapter, quantizer = plan.run.adapter, plan.run.quantizer
    if quantizer is not None and quantizer.name not in QUANTIZERS:
        return f"does not read {quantizer.name} weights"
    if adapter is None:
        return None
    if adapter.name == "full":
        return "does not autocast 32-bit weights" if plan.dtype == "float16" else None
    if adapter.name != "lora":
        return f"does not know the adapter {adapter.name}"
    settings: Any = adapter
    if settings.dropout:
        return "has no LoRA dropout"
    if settings.variant.value == "dora":
        return "has no DoRA"
    if any(target.rpartition(".")[2] in plan.family.lora_targets for target in settings.modules_to_save):
        return "has no projections that are trained whole beside LoRA"
    return None


QUANTIZERS = frozenset({"bnb_nf4", "fp8"})
"""Quantizers whose weights the manual layer reads."""


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the layer on Triton's steps."""
    _install(module, role, "ftcore_kernels.ops")


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the layer on plain PyTorch's steps."""
    _install(module, role, "ftcore_kernels.reference")


def _install(module: Any, role: Role, package: str) -> None:
    structure = Structure(role.traits, ops_of(package))
    structure.arrange(module)
    module.ftcore_structure = structure
    module.ftcore_recompute = Recompute(
        structure.groups(module), module.self_attn.head_dim, "sandwich_norm" in role.traits, "qk_norm" in role.traits
    )
    use(module.self_attn, structure.softcap(module.self_attn))
    bind(module, forward, structure=structure)


def ops_of(package: str) -> Ops:
    """The steps of an implementation: each is a function in the module that is named here."""
    homes = {"norm": "norm_steps", "add_norm": "norm_steps", "norm_backward": "norm_steps"}
    homes |= {"lora_rope_backward": "lora_rope", "lora_glu_backward": "lora_glu"}
    homes |= {"fp8_mm": "fp8_linear", "fp8_mm_t": "fp8_linear"}
    return Ops(**{
        field.name: getattr(import_module(f"{package}.{homes.get(field.name, field.name)}"), field.name)
        for field in fields(Ops)
    })  # fmt: skip
