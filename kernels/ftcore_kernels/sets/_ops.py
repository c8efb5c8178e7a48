"""Which ops there are, for which roles and traits; each in Triton and in plain PyTorch."""

from __future__ import annotations

from ftcore import Kernel, Phase, Requirement

LAYERS = {
    "rms_norm": ("rms_norm", "rms_norm", frozenset({"unit_offset", "weight_in_float32", "norm_without_weight"})),
    "layer_norm": ("layer_norm", "layer_norm", frozenset()),
    "gated_mlp": ("mlp", "mlp", frozenset({"geglu"})),
    "rope": ("attention", "attention", frozenset({"qk_norm", "sliding_window", "attention_softcap"})),
    "linear_cross_entropy": ("lm_head", "lm_head", frozenset()),
}
"""Op to the role that it serves, the module of `layers` that binds it, and the traits that it covers."""

CHOOSY = frozenset({"mlp", "layer_norm"})
"""Those that look at the module before they take it."""

DECODER_TRAITS = frozenset(
    {"qk_norm", "unit_offset", "sandwich_norm", "fused_projections", "sliding_window", "attention_softcap"}
)
"""Departures from Llama's layer that the whole-layer kernel covers."""

GPU = Requirement(device="cuda", capability=(7, 0))
TRITON = Requirement(device="triton", capability=(7, 0))


def kernels(implementation: str, needs: Requirement) -> list[Kernel]:
    """All ops in one implementation: `triton` or `reference`."""
    layer = Kernel(
        f"{implementation}.decoder_layer",
        "decoder_layer",
        install=f"ftcore_kernels.layers.decoder:install_{implementation}",
        traits=DECODER_TRAITS,
        phase=Phase.ADAPTED,
        needs=needs,
        fits="ftcore_kernels.layers.decoder:fits",
    )
    experts = Kernel(
        f"{implementation}.experts",
        "experts",
        install=f"ftcore_kernels.layers.experts:install_{implementation}",
        phase=Phase.ADAPTED,
        needs=needs,
        fits="ftcore_kernels.layers.experts:fits",
        outermost=True,
    )
    return [layer, experts] + [
        Kernel(
            f"{implementation}.{op}",
            role,
            install=f"ftcore_kernels.layers.{layer}:install_{implementation}",
            traits=traits,
            needs=needs,
            fits=f"ftcore_kernels.layers.{layer}:fits" if layer in CHOOSY else None,
        )
        for op, (role, layer, traits) in LAYERS.items()
    ]
