"""Claims: which kernel goes where, and why the others do not. Toy modules, no transformers."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftcore.errors import Refused
from ftcore.patching import bind, patch, unpatch
from ftcore.specs import Kernel, Phase, Requirement, Role

CPU = SimpleNamespace(kind="cpu", capability=(0, 0), runs_triton=False)


class Norm(nn.Module):
    def forward(self, x):
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def forward(self, x):
        return self.norm(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = Norm()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def install(module: nn.Module, role: Role) -> None:
    bind(module, _plus, amount=1.0)


def _plus(module: nn.Module, x: torch.Tensor, *, amount: float) -> torch.Tensor:
    return x + amount


HERE = f"{__name__}:install"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


NORM = Role("norm", "Norm")


def test_every_instance_is_claimed_and_another_model_is_not() -> None:
    net, other = Net(), Net()
    report = patch(net, [NORM], [Kernel("a.norm", "norm", install=HERE)], CPU, Phase.BASE)
    assert [c.module for c in report.claims] == ["layers.0.norm", "layers.1.norm", "norm"]
    assert net(torch.zeros(1)).item() == 3
    assert other(torch.zeros(1)).item() == 0
    assert "forward" not in vars(Norm()) and Norm.forward(Norm(), 5) == 5


def test_patches_survive_deepcopy_and_come_off() -> None:
    net = Net()
    patch(net, [NORM], [Kernel("a.norm", "norm", install=HERE)], CPU, Phase.BASE)
    copied = copy.deepcopy(net)
    assert unpatch(net) == 3
    assert net(torch.zeros(1)).item() == 0
    assert copied(torch.zeros(1)).item() == 3


def test_a_trait_that_the_kernel_does_not_cover_keeps_it_away() -> None:
    role = Role("norm", "Norm", frozenset({"unit_offset"}))
    report = patch(Net(), [role], [Kernel("a.norm", "norm", install=HERE)], CPU, Phase.BASE)
    assert not report.claims
    assert report.skipped[0].reason == "a.norm does not cover unit_offset"
    covering = Kernel("a.norm", "norm", install=HERE, traits=frozenset({"unit_offset"}))
    assert len(patch(Net(), [role], [covering], CPU, Phase.BASE).claims) == 3


def test_a_device_that_will_not_do_is_the_reason() -> None:
    kernel = Kernel("a.norm", "norm", install=HERE, needs=Requirement(device="cuda"))
    assert patch(Net(), [NORM], [kernel], CPU, Phase.BASE).skipped[0].reason == "a.norm needs a GPU"
    old = SimpleNamespace(kind="cuda", capability=(6, 1), runs_triton=True)
    kernel = Kernel("a.norm", "norm", install=HERE, needs=Requirement(device="cuda", capability=(7, 0)))
    assert patch(Net(), [NORM], [kernel], old, Phase.BASE).skipped[0].reason == "a.norm needs compute capability 7.0"


def test_nobody_offers_and_no_such_module() -> None:
    assert "no selected kernel set offers one" in patch(Net(), [NORM], [], CPU, Phase.BASE).skipped[0].reason
    report = patch(Net(), [Role("norm", "Nrom")], [Kernel("a.norm", "norm", install=HERE)], CPU, Phase.BASE)
    assert report.skipped[0].reason == "no module of class Nrom in the model"


def test_two_sets_on_one_role_ask_and_prefer_settles_it() -> None:
    kernels = [Kernel("a.norm", "norm", install=HERE), Kernel("b.norm", "norm", install=HERE)]
    with pytest.raises(Refused, match=r"a\.norm and b\.norm both fit the role norm"):
        patch(Net(), [NORM], kernels, CPU, Phase.BASE)
    report = patch(Net(), [NORM], kernels, CPU, Phase.BASE, prefer={"norm": "b"})
    assert {c.kernel for c in report.claims} == {"b.norm"}


def test_a_whole_layer_kernel_of_the_later_phase_keeps_others_out_of_its_layers() -> None:
    roles = [NORM, Role("decoder_layer", "Layer")]
    kernels = [
        Kernel("a.norm", "norm", install=HERE),
        Kernel("a.layer", "decoder_layer", install=HERE, phase=Phase.ADAPTED),
    ]
    net = Net()
    base = patch(net, roles, kernels, CPU, Phase.BASE)
    assert [c.module for c in base.claims] == ["norm"]
    assert "inside a layer that a whole-layer kernel took over" in [s.reason for s in base.skipped]
    adapted = patch(net, roles, kernels, CPU, Phase.ADAPTED)
    assert [c.module for c in adapted.claims] == ["layers.0", "layers.1"]
