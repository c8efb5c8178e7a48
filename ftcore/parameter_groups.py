"""Which parameters an optimizer steps at which rate, and which of them decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ftcore.config import TrainerConfig
from ftcore.errors import Problem, Refused

if TYPE_CHECKING:
    import torch

EMBEDDING_RATE, RATIO = "embedding_learning_rate", "loraplus_ratio"
PLAIN = 1.0
"""The ratio at which LoRA+ is LoRA."""


def has_rates(trainer: TrainerConfig) -> bool:
    """Whether some parameters are to have another rate than the others."""
    return trainer.embedding_learning_rate is not None or trainer.loraplus_ratio != PLAIN


def parameter_groups(trainer: TrainerConfig, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer takes them: `params`, `lr` and `weight_decay` of each group.

    The first two are transformers' own, with and without decay (norms and biases); then come those of other rates: the
    embedding and the head at `embedding_learning_rate`, and LoRA's B matrices and vectors at `loraplus_ratio` times the
    rate (LoRA+, arXiv 2402.12354).

    Raises Refused where a rate was asked for and nothing that it is for is trained.
    """
    from transformers import Trainer

    # The method reads nothing of the trainer, which does not exist yet.
    decayed = frozenset(Trainer.get_decay_parameter_names(cast(Any, None), model))
    tables = _tables(model) if trainer.embedding_learning_rate is not None else frozenset()
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {("", True): [], ("", False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = ""
            if id(parameter) in tables:
                own = EMBEDDING_RATE
            elif trainer.loraplus_ratio != PLAIN and ("lora_B" in name or parameter.ndim == 1):
                own = RATIO
            groups.setdefault((own, name in decayed), []).append(parameter)
    _used(trainer, {own for own, _ in groups})
    rate = trainer.learning_rate
    rates = {"": rate, EMBEDDING_RATE: trainer.embedding_learning_rate, RATIO: rate * trainer.loraplus_ratio}
    return [
        {"params": parameters, "lr": rates[own], "weight_decay": trainer.weight_decay if decays else 0.0}
        for (own, decays), parameters in groups.items()
    ]


def _tables(model: Any) -> frozenset[int]:
    """Identities of the parameters of the embedding and the head, an adapter's copies and rows among them."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return frozenset(id(parameter) for module in modules if module is not None for parameter in module.parameters())


def _used(trainer: TrainerConfig, owners: set[str]) -> None:
    if trainer.embedding_learning_rate is not None and EMBEDDING_RATE not in owners:
        raise Refused(embeddings_frozen())
    if trainer.loraplus_ratio != PLAIN and RATIO not in owners:
        raise Refused(no_lora())


def embeddings_frozen() -> Problem:
    """What is wrong with a rate for an embedding and a head that are not trained."""
    fix = "add 'adapter.modules_to_save=[embed_tokens,lm_head]', use adapter=full, or leave it out"
    return Problem(f"trainer.{EMBEDDING_RATE}", "neither the embedding nor the head is trained", fix)


def no_lora() -> Problem:
    """What is wrong with a ratio of rates where there is no B."""
    return Problem(
        f"trainer.{RATIO}", "is for LoRA's B matrices, and there are none", "use adapter=lora, or leave it out"
    )
