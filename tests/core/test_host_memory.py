"""The host's memory: what is left of it, in a container too, and what is said where it is not enough."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ftcore import host_memory, memory, remedy
from ftcore.config import Memory
from ftcore.errors import FtcoreError
from ftcore.guards.shortage import is_out_of_memory
from ftcore.host_memory import SPARE, NoHostMemory, available, need
from ftcore.memory import Applied, host_room

GIB = 2**30
FILES = "anon 1\nactive_file 536870912\ninactive_file 536870912\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch) -> Any:
    """Writes the files of control groups, from their lines in /proc/self/cgroup and the values in them."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    own = tmp_path / "own"
    monkeypatch.setattr(host_memory, "OWN_GROUPS", own)

    def write(lines: str, **folders: tuple[object, object, str]) -> None:
        own.write_text(lines)
        for folder, values in folders.items():
            at = tmp_path / folder.replace("__", "/")
            at.mkdir(parents=True, exist_ok=True)
            first = folder.startswith("memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
            for name, value in zip((*names, "memory.stat"), values, strict=True):
                (at / name).write_text(f"{value}\n")

    return write


def test_without_groups_it_is_the_machines(groups) -> None:
    assert available() == 100 * GIB  # no file at all
    groups("0::/\n")
    assert available() == 100 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        (8 * GIB, 5 * GIB, FILES, 4 * GIB),  # pages of files are given up first
        (8 * GIB, 9 * GIB, "inactive_file 0\n", 0),
        ("max", 5 * GIB, "inactive_file 0\n", 100 * GIB),
        (800 * GIB, 5 * GIB, "inactive_file 0\n", 100 * GIB),
    ],
)
def test_a_containers_limit(groups, limit, used, stat, left) -> None:
    groups("0::/jobs/mine\n", jobs__mine=(limit, used, stat))
    assert available() == left


def test_a_limit_further_up_counts_too(groups) -> None:
    groups("0::/jobs/mine\n", jobs__mine=("max", 0, ""), jobs=(9 * GIB, GIB, "inactive_file 0\n"))
    assert available() == 8 * GIB


def test_the_first_version_of_control_groups(groups) -> None:
    groups("4:memory:/a/b\n0::/\n", memory__a=(6 * GIB, GIB, "total_inactive_file 0\ninactive_file 5\n"))
    assert available() == 5 * GIB


def test_processes_of_a_host_share_it(monkeypatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_room(0.5, lambda: 16 * GIB) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_room(0.5, lambda: 16 * GIB) == 2 * GIB


def test_what_is_not_there_is_not_taken(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 3 * GIB + SPARE)
    need(3 * GIB)
    with pytest.raises(NoHostMemory) as caught:
        need(4 * GIB)
    assert str(caught.value) == (
        "the host has 3.0 GiB of memory left, and 4.0 GiB more are needed there\n"
        "    fix: set memory=least, which leaves nothing there, or give the process more"
    )
    assert isinstance(caught.value, FtcoreError)
    assert is_out_of_memory(caught.value), "fewer rows are tried"


# What to set instead -----------------------------------------------------------------------------------------------


class Layer:
    """Inputs of 2 bytes a token, 1 beside them, and 10 of work."""

    recorded = 0
    width = 2

    def input_bytes(self, rows: int, length: int) -> int:
        return 2 * rows * length

    def levels(self, rows: int, length: int) -> list[Any]:
        return [SimpleNamespace(kept=3 * rows * length)]

    def attended_bytes(self, rows: int, length: int) -> tuple[int, int]:
        return 0, 0

    def workspace(self, rows: int, length: int, tiled: bool = False) -> int:
        return 10 * rows * length


def model_with(mode: Memory, monkeypatch: pytest.MonkeyPatch, gpu: int, host: int) -> Any:
    model = torch.nn.ModuleList([torch.nn.Identity() for _ in range(8)])
    for module in model:
        module.ftcore_recompute = Layer()
    model.ftcore_memory = Applied(mode)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(remedy, "host_room", lambda part, there: host)
    monkeypatch.setattr(
        remedy, "budget", lambda model, layers, rows, length, *_: gpu - layers[0].workspace(rows, length)
    )
    return model


@pytest.mark.parametrize(
    ("mode", "gpu", "host", "said"),
    [
        # A token: 10 bytes of work, two inputs of 2 on the GPU, 8 x 1 beside them, six inputs on the host. Or three
        # on the GPU, five kept, and so 5 x 1 beside them: 21.
        (Memory.auto, 22 * 5120, 12 * 5120, "set memory=offload (longest row that fits: 5,120 tokens), or lower "),
        (Memory.off, 21 * 5120 - 1, 12 * 5120, "set memory=offload (longest row that fits: 4,864 tokens), or lower "),
        (
            Memory.offload,
            22 * 5120,
            12 * 5120,
            "lower trainer.micro_batch or trainer.max_length (longest row",
        ),
        (Memory.least, 100, 0, "free some of the GPU, or take a smaller model: with 90 B no row fits"),
    ],
)
def test_the_next_setting_and_the_longest_row(monkeypatch, mode, gpu, host, said) -> None:
    assert remedy.remedy(model_with(mode, monkeypatch, gpu, host)).startswith(said)


def test_a_row_that_is_a_pair_is_half_as_long(monkeypatch) -> None:
    model = model_with(Memory.auto, monkeypatch, 22 * 5120, 12 * 5120)
    model.ftcore_memory = Applied(Memory.auto, sequences=2)
    assert "longest row that fits: 2,560 tokens" in remedy.remedy(model)


def test_a_host_without_memory_is_left_alone(monkeypatch) -> None:
    model = model_with(Memory.offload, monkeypatch, 10**6, 0)
    assert remedy.remedy(model, of_host=True).startswith("set memory=least, which leaves nothing in host memory")


@pytest.mark.parametrize(("mode", "said"), [(Memory.auto, "set memory=least, or lower "), (Memory.least, "lower ")])
def test_without_a_gpu_or_kernels(mode, said) -> None:
    model = torch.nn.Linear(1, 1)
    model.ftcore_memory = Applied(mode)
    assert remedy.remedy(model).startswith(said)


def test_a_part_of_the_gpu_is_all_there_is(monkeypatch) -> None:
    """`torch.cuda.set_per_process_memory_fraction` is a wall, which the driver does not know of."""
    text = SimpleNamespace(vocab_size=0, hidden_size=0)
    model = torch.nn.Linear(1, 1).requires_grad_(False)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    for name, value in (("memory_allocated", GIB), ("memory_reserved", GIB), ("mem_get_info", (70 * GIB, 80 * GIB))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda *_: 0.25)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    found = memory.budget(model, [Layer()], 1, 0, 0, False, None)
    assert found == int((1 - memory.GIVEN_AWAY) * 19 * GIB)


def test_what_recorded_launches_hold_is_not_free(monkeypatch) -> None:
    """The allocator gives it to nobody else; to further recordings it does."""
    text = SimpleNamespace(vocab_size=0, hidden_size=0)
    model = torch.nn.Linear(1, 1).requires_grad_(False)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    for name, value in (
        ("memory_allocated", GIB),
        ("memory_reserved", 9 * GIB),
        ("mem_get_info", (20 * GIB, 80 * GIB)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda *_: 1.0)
    parts = [
        {"segment_pool_id": [0, 0], "total_size": 3 * GIB, "allocated_size": GIB},
        {"segment_pool_id": (0, 1), "total_size": 6 * GIB, "allocated_size": GIB},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: parts)
    free = [memory.budget(model, [Layer()], 1, 0, 0, recorded, None) for recorded in (False, True)]
    assert free == [int((1 - memory.GIVEN_AWAY) * (28 - held) * GIB) for held in (5, 0)]
