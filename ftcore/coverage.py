"""Which kernels serve a model family, and why some roles have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcore import hooks as specs
from ftcore.catalog import Option, installed
from ftcore.config import ModelConfig, RunConfig
from ftcore.device import Device
from ftcore.errors import FtcoreError
from ftcore.manager import Hooks
from ftcore.specs import Kernel, ModelFamily, Role

TRAITS = {
    "activation_sparsity": "all but the largest part of the gate is zero",
    "all_experts_run": "every expert sees every token, the others' inputs being zero",
    "alternating_updates": "several copies of the hidden states are predicted and corrected (AltUp)",
    "attention_sinks": "a learned logit per head takes part in the softmax",
    "attention_softcap": "attention scores are capped by tanh",
    "bidirectional": "a query sees later keys as well",
    "chunked_attention": "a query sees the keys of its own chunk",
    "codebook_heads": "the logits are of a codec's codebooks, and a second loss is added",
    "clamped_swiglu": "gate and up are clamped, and one is added to up",
    "encoder_decoder": "a decoder attends to an encoder's output, and labels are shifted to its inputs",
    "expert_biases": "experts have biases",
    "experts": "a router picks some of many MLPs for each token",
    "fused_projections": "one linear layer for queries, keys and values, and one for gate and up",
    "geglu": "GELU in the gated MLP",
    "half_width_rope": "tables of angles are half as wide as a head",
    "interleaved_gate_up": "gate and up alternate in one matrix",
    "interleaved_rope": "RoPE turns neighbours, not halves",
    "weight_in_float32": "the norm's weight is applied in float32, without an offset of one",
    "latent_attention": "queries, keys and values come from small latents (MLA)",
    "norm_after_rope": "queries and keys are normed after RoPE, without weights",
    "norm_without_weight": "some norms have no weight",
    "no_rope": "positions are learned, not turned into queries and keys",
    "other_dropout_name": "the attention's dropout is called otherwise than Llama's",
    "own_projection_names": "projections are not called as Llama's",
    "qk_norm": "queries and keys are normed per head before RoPE",
    "sandwich_norm": "norms stand before and after attention and MLP",
    "shared_keys_and_values": "upper layers attend to the keys and values of a lower one",
    "short_convolution": "some layers have a gated causal convolution in place of attention",
    "sliding_window": "a query sees the last so many keys",
    "two_decoders": "a second decoder runs over the codebooks of each frame, in batches of another shape",
    "ungated_mlp": "two linear layers with GELU between them",
    "unit_offset": "the norm's weight is 1 + w",
    "value_norm": "values are normed too",
}
"""What the traits of ftcore's own families mean; a third party's trait says it by its name."""


@dataclass(frozen=True)
class Row:
    """One role of a family."""

    role: Role
    sets: tuple[str, ...]
    """Kernel sets with a kernel that covers every trait of the role."""
    uncovered: frozenset[str]
    """Traits that some kernel for the role does not cover."""
    reasons: tuple[str, ...]
    """Why those kernels do not serve it, or that there is none."""


def coverage(family: ModelFamily, sets: Sequence[Option] | None = None) -> list[Row]:
    """One row a role, by the maths alone: device, adapter and quantizer of a run may take kernels away again.

    :param sets: Kernel sets to look at; None takes all that are installed.
    """
    kernels = offered(family, installed().options("kernels") if sets is None else sets)
    return [_row(role, [kernel for kernel in kernels if kernel.role == role.name]) for role in family.roles]


def _row(role: Role, kernels: Sequence[Kernel]) -> Row:
    sets = dict.fromkeys(kernel.name.partition(".")[0] for kernel in kernels if role.traits <= kernel.traits)
    missing: dict[frozenset[str], list[str]] = {}
    for kernel in kernels:
        if uncovered := role.traits - kernel.traits:
            missing.setdefault(uncovered, []).append(kernel.name)
    reasons = [f"{' and '.join(sorted(k))}: not for {', '.join(sorted(traits))}" for traits, k in missing.items()]
    return Row(
        role,
        sets=tuple(sorted(sets)),
        uncovered=frozenset().union(*missing),
        reasons=tuple(reasons if kernels else ["no installed kernel set has one"]),
    )


def offered(family: ModelFamily, sets: Sequence[Option]) -> list[Kernel]:
    """Every kernel of the sets, once; a set that is broken offers none."""
    found: dict[str, Kernel] = {}
    for option in sets:
        try:
            hooks = Hooks.for_run(RunConfig(), installed(), [option.load()])
            kernels = hooks.collect(specs.ftcore_kernels, family=family, device=Device())
        except FtcoreError:
            continue
        found |= {kernel.name: kernel for kernel in kernels}
    return list(found.values())


def family_of(option: Option) -> ModelFamily | None:
    """What a model plugin says of its family; None where the plugin is broken."""
    try:
        config = option.config_class()(name=option.name)
        assert isinstance(config, ModelConfig)
        hooks = Hooks.for_run(RunConfig(), installed(), [option.load()])
        return hooks.maybe(specs.ftcore_model_family, config=config)
    except FtcoreError:
        return None


def families_for(model_type: str) -> list[str]:
    """Names of the installed model plugins that take checkpoints of this `model_type`, its namesake first."""
    options = installed().options("model")
    names = {o.name for o in options if (family := family_of(o)) and model_type in family.model_types}
    return sorted(names, key=lambda name: (name != model_type, name))
