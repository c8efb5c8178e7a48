"""Put kernels on module instances: roles x kernels -> claims -> patched instances -> report.

Nothing is put on a class or a module of transformers, so a second model in the process stays as it was, and a patch
can be taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from ftcore.device import Device
from ftcore.errors import Problem, Refused
from ftcore.manager import import_function
from ftcore.specs import Claim, Kernel, PatchReport, Phase, Plan, Role, Skip

if TYPE_CHECKING:
    from torch import nn

BOUND = "_ftcore_forward"
"""Attribute of a patched module that remembers the forward that ftcore gave it."""
UNDO = "_ftcore_undo"
"""Attribute of a module whose patch changed something besides a forward: what to call to change it back."""
DECODER_LAYER = "decoder_layer"
"""A kernel for this role takes over a whole layer, so nothing inside that layer is claimed as well."""
INSIDE = "inside a layer that a whole-layer kernel took over"
"""Why a role has no kernel of its own there."""


@dataclass(frozen=True)
class _Site:
    path: str
    module: nn.Module
    role: Role
    kernel: Kernel


def patch(
    model: nn.Module,
    roles: Sequence[Role],
    kernels: Sequence[Kernel],
    device: Device,
    phase: Phase,
    prefer: Mapping[str, str] | None = None,
    plan: Plan | None = None,
) -> PatchReport:
    """Claim the model's modules and install the kernels of this phase.

    Claims of both phases are resolved on the model as it is given, so that a whole-layer kernel of the later phase
    keeps the earlier phase from touching its layers. Kernels that ask about the run are only asked with a plan. Raises
    Refused when two kernels fit one role.
    """
    sites, skipped = resolve(model, roles, kernels, device, prefer or {}, plan)
    claims = []
    for site in sites:
        if site.kernel.phase is phase:
            install: Callable[[nn.Module, Role], None] = import_function(site.kernel.install, site.kernel.name)
            install(_outermost(model, site) if site.kernel.outermost else site.module, site.role)
            claims.append(Claim(module=site.path, role=site.role.name, kernel=site.kernel.name))
    return PatchReport(claims=tuple(claims), skipped=tuple(skipped) if phase is Phase.BASE else ())


def resolve(
    model: nn.Module,
    roles: Sequence[Role],
    kernels: Sequence[Kernel],
    device: Device,
    prefer: Mapping[str, str],
    plan: Plan | None = None,
) -> tuple[list[_Site], list[Skip]]:
    """Which kernel goes where, and why some roles get none."""
    chosen: dict[Role, Kernel] = {}
    skipped: list[Skip] = []
    for role in roles:
        kernel, reason = _choose(role, kernels, device, prefer)
        if kernel:
            chosen[role] = kernel
        else:
            skipped.append(Skip(role=role.name, module=role.module, reason=reason))
    sites = [
        _Site(path, module, role, chosen[role])
        for path, module in model.named_modules()
        for role in chosen
        if role.module in _class_names(module)
    ]
    for role in chosen:
        if not any(site.role is role for site in sites):
            skipped.append(
                Skip(role=role.name, module=role.module, reason=f"no module of class {role.module} in the model")
            )
    return _without_inner(_fitting(sites, skipped, plan), skipped), skipped


def _outermost(model: nn.Module, site: _Site) -> nn.Module:
    """PEFT's wrapper around the site's module, the outermost if there are several, or the module."""
    path = site.path
    while path.rpartition(".")[2] == "base_layer":
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


def _fitting(sites: list[_Site], skipped: list[Skip], plan: Plan | None) -> list[_Site]:
    """The sites whose kernel takes them in this run; the reasons of the others are told once each."""
    kept = []
    reasons: dict[tuple[str, str, str], None] = {}  # ordered, and each once
    for site in sites:
        reason = None
        if site.kernel.fits and plan is not None:
            reason = import_function(site.kernel.fits, site.kernel.name)(site.module, site.role, plan)
        if reason is None:
            kept.append(site)
        else:
            reasons[site.role.name, site.role.module, f"{site.kernel.name} {reason}"] = None
    skipped += [Skip(role=role, module=module, reason=reason) for role, module, reason in reasons]
    return kept


def _choose(
    role: Role, kernels: Sequence[Kernel], device: Device, prefer: Mapping[str, str]
) -> tuple[Kernel | None, str]:
    offered = [k for k in kernels if k.role == role.name]
    if not offered:
        return None, "no selected kernel set offers one"
    reasons = []
    fitting = []
    for kernel in offered:
        uncovered = role.traits - kernel.traits
        if uncovered:
            reasons.append(f"{kernel.name} does not cover {', '.join(sorted(uncovered))}")
        elif missing := kernel.needs.missing(device):
            reasons.append(f"{kernel.name} {missing}")
        else:
            fitting.append(kernel)
    wanted = prefer.get(role.name)
    if wanted:
        fitting = [k for k in fitting if k.name.partition(".")[0] == wanted] or fitting
    sets = {kernel.name.partition(".")[0] for kernel in fitting}
    if len(sets) > 1:
        names = " and ".join(kernel.name for kernel in fitting)
        fix = f"say patching.prefer.{role.name}={sorted(sets)[0]}"
        raise Refused(Problem("kernels", f"{names} both fit the role {role.name} ({role.module})", fix))
    return (fitting[0], "") if fitting else (None, "; ".join(reasons))


def _without_inner(sites: list[_Site], skipped: list[Skip]) -> list[_Site]:
    layers = [site.path for site in sites if site.role.name == DECODER_LAYER]
    kept: list[_Site] = []
    dropped: dict[Role, None] = {}  # ordered
    for site in sites:
        if site.role.name != DECODER_LAYER and any(site.path.startswith(layer + ".") for layer in layers):
            dropped[site.role] = None
        else:
            kept.append(site)
    for role in dropped:
        skipped.append(Skip(role=role.name, module=role.module, reason=INSIDE))
    return kept


def _class_names(module: nn.Module) -> Iterator[str]:
    return (cls.__name__ for cls in type(module).__mro__)


def bind(module: nn.Module, forward: Callable[..., Any], **fixed: Any) -> None:
    """Give one module instance a new forward: `forward(module, *inputs, **fixed)`."""
    module.forward = MethodType(partial(forward, **fixed) if fixed else forward, module)
    vars(module)[BOUND] = module.forward


def unpatch(model: nn.Module) -> int:
    """Take every forward that :func:`bind` put there off again, and what came with it; returns how many there were.

    A forward that somebody put over it since, as trainers do, stays.
    """
    bound = [module for module in model.modules() if BOUND in vars(module)]
    for module in bound:
        if vars(module).get("forward") == vars(module).pop(BOUND):
            del module.forward
    for module in model.modules():
        if (undo := vars(module).pop(UNDO, None)) is not None:
            undo()
    return len(bound)
