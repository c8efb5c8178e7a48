"""Gives a model back the head that a kernel put on it, after a TRL trainer's constructor put its own there.

What a kernel for the role `lm_head` keeps to, so that a trainer may use it. Its forward, bound to the `...ForCausalLM`
instance, answers `labels` with `fused_lm_head=True` by the fields of TRL's `FusedCausalLMOutput` (`log_probs` and
`loss` with gradients, `entropy` and `is_top1` without), and with `fused_loss=True` by `loss`, `entropy_sum`, `top1_sum`
and `tokens`. The instance's attribute `ftcore_lm_head` has a `temperature`, which divides the logits of the former, and
`mean_logits`: whether the former has the field of that name, without a gradient. Both take `supervised`, the places of
the labels that count, and `begins`, which says in short what the attention mask would.
"""

from __future__ import annotations

from typing import Any

from ftcore.patching import BOUND

SETTINGS = "ftcore_lm_head"


def take_over(trainer: Any, temperature: float = 1.0, mean_logits: bool = False) -> bool:
    """Put the kernel's head where TRL's is; returns False, and TRL's stays, where there is none or it does not fit.

    Called after TRL's constructor, which binds its own forward to the base model.
    """
    base = base_of(trainer.model)
    settings, forward = vars(base).get(SETTINGS), vars(base).get(BOUND)
    routed = hasattr(base.config.get_text_config(), "output_router_logits")  # TRL's head has the router's loss
    if settings is None or forward is None or routed or _sharded(trainer):
        return False
    settings.temperature, settings.mean_logits = temperature, mean_logits
    base.forward = forward
    return True


def base_of(model: Any) -> Any:
    """The transformers model under a PEFT adapter."""
    getter = getattr(model, "get_base_model", None)
    return getter() if getter else model


def _sharded(trainer: Any) -> bool:
    """Whether the weights or the sequence are spread over processes: TRL's head gathers them."""
    from accelerate.utils import DistributedType

    accelerator = trainer.accelerator
    spread = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return accelerator.distributed_type in spread or getattr(accelerator, "parallelism_config", None) is not None
