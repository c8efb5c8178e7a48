"""A prompt that is read once for all its completions: the log-probabilities and gradients are those of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import held, move

from ftcore.testing import maths
from ftcore_kernels.layers.decoder.attention import said
from ftcore_trainers._fused_head import base_of
from ftcore_trainers._shared_prompts import tree_of

STEP = (
    "trainer.share_prompts=true",
    "trainer.max_completion_length=6",
    "trainer.global_batch=6",
    "trainer.num_generations=2",
)
PROMPTS = ([7, 8, 9, 10, 11], [1, 2, 3, 4]) * 3
COMPLETIONS = ([20, 21, 22], [30], [23], [31, 32, 33, 34], [], [40, 41])
WIDTH = 5


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a dense mask, where a GPU has a kernel."""
    monkeypatch.setattr(said, "WITH_BRANCHES", {"cpu", "cuda"})


def trainer_of(name: str, folder: Path, *words: str, family: str = "qwen3") -> Any:
    made = held(folder / "run", name, *STEP, *words, model=family).trainer
    move(made.model)
    return made


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """As TRL has them: prompts end, and completions begin, in the same columns."""
    longest = max(map(len, PROMPTS))
    ids = torch.full((len(PROMPTS), longest + WIDTH), 258)
    mask = torch.zeros_like(ids)
    for row, (prompt, said_) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        at = slice(longest - len(prompt), longest + len(said_))
        ids[row, at], mask[row, at] = torch.tensor([*prompt, *said_]), 1
    return ids, mask


def read(trainer: Any, shared: bool, batch_size: int | None = None) -> list[torch.Tensor]:
    """Log-probabilities, entropies, and gradients of a weighted sum."""
    trainer.share_prompts = shared
    calls, base = [], base_of(trainer.model)
    hook = base.base_model.register_forward_pre_hook(
        lambda m, args, kw: calls.append(kw["input_ids"].shape), with_kwargs=True
    )
    ids, mask = (tensor.to(trainer.model.device) for tensor in padded())
    trainer.model.train().zero_grad()
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, WIDTH, batch_size, compute_entropy=True
    )
    hook.remove()
    weights = torch.arange(1.0, logps.numel() + 1, device=logps.device).view(logps.shape) * mask[:, -WIDTH:]
    (logps * weights).sum().backward()
    assert [shape[0] for shape in calls] == [1] * len(calls) if shared else calls == [ids.shape]
    seen = mask[:, -WIDTH:].bool()
    return [
        logps.detach()[seen],
        entropies.detach()[seen],
        *(p.grad for p in trainer.model.parameters() if p.requires_grad),
    ]


WAYS = {
    "reference": (),
    "full": ("adapter=full",),
    "triton": ("kernels=[triton]",),
}
SLOW = {("grpo", "triton"), ("rloo", "triton"), ("rloo", "full")}
CASES = [
    pytest.param(name, way, marks=pytest.mark.slow if (name, way) in SLOW else ())
    for name in ("grpo", "rloo")
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_same_as_in_rows(on_cpu, in_tmp: Path, name: str, way: str) -> None:
    trainer = trainer_of(name, in_tmp, *WAYS[way])
    rows, shared = read(trainer, False), read(trainer, True)
    assert len(rows) == len(shared) > 3
    assert max(maths.apart(one, other) for one, other in zip(shared, rows, strict=True)) <= 1e-5
    parts = read(trainer, True, batch_size=3)
    assert max(maths.apart(one, other) for one, other in zip(parts, rows, strict=True)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_windows_that_are_too_short_stay_in_rows(on_cpu, in_tmp: Path, family: str) -> None:
    trainer = trainer_of("grpo", in_tmp, family=family)
    rows = read(trainer, False)
    takes = said.takes_branches(base_of(trainer.model).base_model, 64)
    assert takes == (family == "llama")
    if takes:
        assert maths.apart(read(trainer, True)[0], rows[0]) <= 1e-5


def test_a_reference_reads_them_too(on_cpu, in_tmp: Path) -> None:
    trainer = trainer_of("grpo", in_tmp, "trainer.beta=0.1")
    ids, mask = (tensor.to(trainer.model.device) for tensor in padded())
    found = []
    for shared in (False, True):
        trainer.share_prompts = shared
        with torch.no_grad():
            found.append(trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, WIDTH, 6)[0])
    seen = mask[:, -WIDTH:].bool()
    assert maths.apart(found[1][seen], found[0][seen]) <= 1e-6


def test_a_tree_is_written_down() -> None:
    tree = tree_of([[1, 2, 3], [1, 2, 3], [8, 9]], [[4, 5], [], [6]], 2)
    assert tree is not None
    assert tree.ids == [1, 2, 8, 3, 4, 3, 9]
    assert tree.positions == [0, 1, 0, 2, 3, 2, 1]
    assert tree.targets == [-100, -100, -100, 4, 5, -100, 6]
    assert (tree.beginnings, tree.branches) == ([2, 1], [[2, 1], [1]])
    assert (tree.places, tree.rows) == ([0, 1, 4], [3, 4, 6])


def test_where_it_is_not_worth_it() -> None:
    assert tree_of([[1, 2, 3], [4, 5, 6]], [[7], [8]], 1) is None, "nothing is shared"
    assert tree_of([[1], [1]], [[7], [8]], 1) is None, "a prompt of one token has no beginning"
    long = list(range(100))
    assert tree_of([[1, 2], [1, 2]], [long, long], 100) is None, "one token of two hundred"


def test_a_gpu_is_where_it_happens(in_tmp: Path) -> None:
    trainer = trainer_of("grpo", in_tmp)
    assert trainer.share_prompts
    assert said.takes_branches(base_of(trainer.model).base_model, 8) == torch.cuda.is_available()
    assert not trainer_of("grpo", in_tmp / "off", "trainer.share_prompts=false").share_prompts
