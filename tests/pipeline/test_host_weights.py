"""A whole run whose frozen embedding and head are in host memory trains, answers, saves and exports what it would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ftcore
from ftcore import hookimpl
from ftcore.memory import leave_in_host_memory

WORDS = (
    *("+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[reference]", "+trainer=sft"),
    *("trainer.max_length=96", "trainer.global_batch=2", "data.eval_size=2", "sampling.max_new_tokens=4"),
    *("trainer.save_steps=2", "trainer.schedule=constant", "trainer.warmup=0", "+export=[safetensors]"),
)


class Leaves:
    """Does on a CPU what `memory=offload` does on a GPU."""

    left = 0

    @hookimpl(wrapper=True)
    def ftcore_make_trainer(self, plan: Any, model: Any) -> Any:
        self.left = leave_in_host_memory(plan, model)
        return (yield)


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's artifacts and its adapter, by file and name."""
    files = [*(folder / "trained").rglob("*.safetensors"), *(folder / "export").rglob("*.safetensors")]
    return {f"{file.relative_to(folder)} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.slow
def test_a_run_is_the_same_to_the_last_bit_and_so_is_one_that_goes_on(in_tmp: Path) -> None:
    plain = ftcore.run([*WORDS, "trainer.max_steps=4", "output_dir=plain"])
    leaves = Leaves()
    away = ftcore.run([*WORDS, "trainer.max_steps=4", "output_dir=away"], plugins=[leaves])
    assert leaves.left > 0
    assert {k: v for k, v in away.metrics.items() if "loss" in k} == {
        k: v for k, v in plain.metrics.items() if "loss" in k
    }
    assert [answer.after for answer in away.answers] == [answer.after for answer in plain.answers]
    expected = written(Path("plain"))
    assert any("lm_head" in name for name in expected)
    assert any("embed_tokens" in name for name in expected)
    found = written(Path("away"))
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []

    ftcore.run([*WORDS, "trainer.max_steps=2", "output_dir=parts"], plugins=[Leaves()])
    ftcore.run([*WORDS, "trainer.max_steps=4", "output_dir=parts", "resume=last"], plugins=[Leaves()])
    found = written(Path("parts"))
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
