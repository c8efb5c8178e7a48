"""What a policy is held to: its own weights as they were before training, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ftcore import Plan
from ftcore_trainers._preference import BEGINS_AS_NOTHING


class Reference(nn.Module):
    """Called like the policy, and answers as the policy did before training.

    It has no parameters of its own as far as PyTorch is concerned, so that no trainer moves, wraps or saves them.
    """

    # accelerate would put autocast around it; the policy, which does the work, has it already.
    _is_accelerate_prepared = True

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple, or it would be a part of this module
        self.masked = True
        """Whether the attention mask is passed on."""

    @property
    def config(self) -> Any:
        """The policy's."""
        return self._policy[0].config

    def forward(self, **inputs: Any) -> Any:
        """The policy's answer before training, without gradients."""
        if not self.masked:
            inputs.pop("attention_mask", None)
        with torch.no_grad():
            return self._answer(self._policy[0], inputs)

    def _answer(self, policy: Any, inputs: dict[str, Any]) -> Any:
        raise NotImplementedError


class AdapterOff(Reference):
    """The policy without its adapter."""

    def _answer(self, policy: Any, inputs: dict[str, Any]) -> Any:
        with switched_off(policy):
            return policy(**inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights that answer; a cache of their answers goes by them."""
        policy = self._policy[0]
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in policy.state_dict().items() if name not in trained}


class Copied(Reference):
    """The policy with a copy of all that is trained: of the adapter, or of every weight."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self._copies: dict[str, torch.Tensor] = {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }

    def _answer(self, policy: Any, inputs: dict[str, Any]) -> Any:
        return functional_call(policy, self._copies, kwargs=inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights that answer; a cache of their answers goes by them."""
        return {**self._policy[0].state_dict(), **self._copies}


def switched_off(policy: Any) -> AbstractContextManager[None]:
    """PEFT's `disable_adapter` without its look at the status of every module."""

    @contextmanager
    def off() -> Iterator[None]:
        policy.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            policy.base_model.enable_adapter_layers()

    return off()


def reference_of(plan: Plan, policy: Any, which: str) -> Reference:
    """The reference model of a run, made before training.

    :param which: `base` is the policy without its adapter, `start` the policy as it is now.
    """
    adapted = hasattr(policy, "peft_config")
    return AdapterOff(policy) if adapted and (which == "base" or _adds_nothing(plan)) else Copied(policy)


def _adds_nothing(plan: Plan) -> bool:
    adapter: Any = plan.run.adapter
    if getattr(adapter, "name", None) != "lora":  # nobody knows what another one begins with
        return False
    return adapter.path is None and adapter.init.value in BEGINS_AS_NOTHING
