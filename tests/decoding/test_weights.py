"""4-bit weights while completions are written: unpacked or packed, the tokens are the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, prompts_of

from ftcore import Sampling
from ftcore.testing import runs
from ftcore_kernels.decoding import weights
from ftcore_kernels.layers.decoder.dense import Dense

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
ROOM = 2**30
PROMPTS = 3
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps one by one where calls are counted: a recorded one calls nothing."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("ftcore_kernels.decoding.engine.recordable", lambda *_: False)


@pytest.fixture(scope="module")
def nf4() -> Both:
    return both("+quantizer=bnb_nf4")


class Counted:
    """How often a layer's weights were dequantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        own = Dense._dequantized

        def counting(dense: Any, *args: Any) -> torch.Tensor:
            self.number += 1
            return own(dense, *args)

        monkeypatch.setattr(Dense, "_dequantized", counting)


def written(made: Both, room: int, rows: int = 8) -> Any:
    """Completions with so many bytes for unpacked weights and a cache, the weights read anew."""
    from ftcore_kernels.decoding.engine import Limits

    made.fast._ready()
    engine: Any = made.fast._engine
    engine.close()
    engine._limits = Limits(rows, 100, (lambda: 2 * room) if room else None)
    return made.fast.generate(prompts_of(9, 4, 17), GREEDY)


def steps(found: Any) -> int:
    """Tokens of the longest."""
    return max(map(len, found.ids))


def products(made: Both) -> int:
    """Of all layers."""
    return 4 * made.model.config.num_hidden_layers


def test_packed_and_unpacked_weights_write_the_same(nf4: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed ones are dequantized for passes over prompts alone, unpacked ones once for all."""
    counted = Counted(monkeypatch)
    unpacked = written(nf4, ROOM)
    assert counted.number == products(nf4)
    monkeypatch.setattr(weights, "PREFERRED", "packed")
    monkeypatch.setattr(weights, "FEW_ROWS", 4)
    counted.number = 0
    packed = written(nf4, ROOM, rows=256)  # of which three are wanted
    assert 0 < counted.number <= PROMPTS * products(nf4) < steps(packed) * products(nf4)
    assert packed.ids == unpacked.ids == nf4.plain.generate(prompts_of(9, 4, 17), GREEDY).ids
    for one, other in zip(packed.logprobs, unpacked.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other))


def test_without_room_they_stay_packed(nf4: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    monkeypatch.setattr(weights, "FEW_ROWS", 4)
    assert weights.PREFERRED == "unpacked"
    found = written(nf4, 0, rows=3)
    assert 0 < counted.number <= PROMPTS * products(nf4) < steps(found) * products(nf4)


@pytest.mark.parametrize("room", [0, ROOM])
def test_many_rows_are_not_read_packed(nf4: Both, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They unpack if there is room, else for every step."""
    counted = Counted(monkeypatch)
    monkeypatch.setattr(weights, "PREFERRED", "packed")
    monkeypatch.setattr(weights, "FEW_ROWS", 2)
    found = written(nf4, room, rows=3)
    if room:
        assert counted.number == products(nf4)
    else:
        assert counted.number >= products(nf4) * steps(found)


def test_ranks_above_those_that_kernels_add(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both("+quantizer=bnb_nf4", "adapter.r=100")
    monkeypatch.setattr(weights, "PREFERRED", "packed")
    assert written(made, ROOM).ids == made.plain.generate(prompts_of(9, 4, 17), GREEDY).ids


def in_float8(kernels: str, monkeypatch: pytest.MonkeyPatch) -> Both:
    """The adapter alone is moved off its start: float8 weights know no addition."""
    monkeypatch.setattr(runs, "shake", partial(runs.shake, trainable_only=True))
    return both("+quantizer=fp8", kernels)


def test_float8_weights_have_a_kernel_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are `fp8_mm`'s but for the order of a sum, so these tokens are the same."""
    made = in_float8("kernels=[reference]", monkeypatch)
    monkeypatch.setattr(weights, "OWN_FP8", False)
    padded = written(made, 0)
    monkeypatch.setattr(weights, "OWN_FP8", True)
    calls = []
    fp8_rows = weights.op("fp8_rows", made.model.device)
    monkeypatch.setattr(weights, "op", lambda *_: lambda *given: calls.append(given[0].shape[0]) or fp8_rows(*given))
    few = written(made, 0)
    assert few.ids == padded.ids
    assert len(calls) >= products(made) * (steps(few) - 1)
    assert max(calls) <= weights.FEW_ROWS


@pytest.mark.gpu
@ON_GPU
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8")
def test_the_float8_kernel_writes_what_the_product_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = in_float8("kernels=[triton]", monkeypatch)
    monkeypatch.setattr(weights, "OWN_FP8", False)
    padded = written(made, ROOM)
    monkeypatch.setattr(weights, "OWN_FP8", True)
    few = written(made, ROOM)
    assert [ids[0] for ids in few.ids] == [ids[0] for ids in padded.ids]
    for one, other in zip(few.logprobs, padded.logprobs, strict=True):
        assert abs(one[1] - other[1]) < 0.02


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_kernels_write_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen 2 has biases, Phi 3 fused projections."""
    made = both("+quantizer=bnb_nf4", "kernels=[triton]", family=family)
    unpacked = written(made, ROOM)
    monkeypatch.setattr(weights, "PREFERRED", "packed")
    assert written(made, ROOM).ids == unpacked.ids
