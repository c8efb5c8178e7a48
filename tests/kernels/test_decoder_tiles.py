"""The MLP of the whole layer in tiles of rows: the same numbers, and nothing as wide as the MLP for all tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import LEVELS, adapt, base, batch, build, keep, layers, manual, own_forwards, pair, patched
from hypothesis import given
from hypothesis import strategies as st
from tensor_peaks import Live

import ftcore
from ftcore.testing import maths, runs
from ftcore_kernels.layers.decoder import tiles
from ftcore_kernels.layers.decoder.gradients import Gradients, Sums
from ftcore_kernels.layers.decoder.recompute import Recompute

TILE = 7
"""Of 33 rows: the last tile has 5."""


@pytest.fixture
def tiled(monkeypatch) -> Any:
    """A switch: tiles of so many rows in every layer, or none."""
    return lambda rows: monkeypatch.setattr(Recompute, "tile", lambda self, hidden: rows)


def assert_close(one: Any, other: Any) -> None:
    """Loss and gradients of tiles and of the whole; every parameter has a gradient on both sides."""
    assert maths.apart(one[0], other[0]) <= 1e-6
    assert set(one[1]) == set(other[1])
    far = {name: away for name in one[1] if not (away := maths.apart(one[1][name], other[1][name])) <= 1e-5}
    assert not far
    assert [name for name in one[1] if one[1][name].dtype != other[1][name].dtype] == []
    assert [name for name, gradient in one[1].items() if not gradient.any()] == []


LORA = {"LoRA": None, "wide LoRA": {"r": 100}, "down": {"target_modules": ["down_proj"]}, "full": False}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "gemma2", "phi3"])
def test_tiles_are_the_whole(family, lora, tiled) -> None:
    _, ours = pair(family, lora=lora)
    tiled(0)
    whole = manual(ours, batch())
    tiled(TILE)
    for level in (0, 3, LEVELS - 1):
        keep(ours, level)
        assert_close(manual(ours, batch()), whole)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", None),
        ("gemma2", None),
        pytest.param("qwen3", None, marks=pytest.mark.slow),
        pytest.param("llama", {"r": 100}, marks=pytest.mark.slow),
        pytest.param("gemma2", False, marks=pytest.mark.slow),
    ],
)
def test_tiles_are_the_whole_on_triton(family, lora, tiled) -> None:
    maths.needs_triton("triton")
    _, ours = pair(family, "triton", lora, num_hidden_layers=1, layer_types=None)
    found = []
    for rows in (0, 4):
        tiled(rows)
        keep(ours, 0)
        found.append(manual(ours, batch(2, 5)))
    assert_close(*found)


@pytest.mark.parametrize("lora", [None, False], ids=["LoRA", "full"])
def test_16_bits_in_tiles_are_no_further_from_the_truth(lora, tiled) -> None:
    """bfloat16 against float64, over all gradients."""
    plain = build().to(torch.bfloat16)
    if lora is not False:
        plain = adapt(plain)
    _, truth = maths.loss_and_gradients(copy.deepcopy(plain).double(), batch())
    ours = patched(plain)
    keep(ours, 0)

    def far(rows: int) -> float:
        tiled(rows)
        found = manual(ours, batch())[1]
        return maths.apart(*(torch.cat([of[name].double().flatten() for name in truth]) for of in (found, truth)))

    assert far(TILE) <= 1.1 * far(0)


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_tiles_of_any_size(rows, tiled) -> None:
    _, ours = pair()
    keep(ours, 0)
    tiled(0)
    whole = manual(ours, batch())
    tiled(rows)
    assert_close(manual(ours, batch()), whole)


def test_two_micro_batches_in_tiles_add_up(tiled) -> None:
    """A gradient that was handed over is not added to again."""
    _, ours = pair()
    keep(ours, 0)
    tiled(TILE)
    once = manual(ours, batch())[1]
    ours(**batch()).loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is None or maths.apart(parameter.grad.cpu(), 2 * once[name].cpu()) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_evaluation_in_tiles(family, tiled) -> None:
    _, ours = pair(family)
    found = []
    with torch.no_grad(), own_forwards(ours) as calls:
        for rows in (0, TILE):
            tiled(rows)
            found.append(ours(**batch()).logits)
    assert not calls
    assert maths.apart(*found) <= 1e-6


@pytest.mark.parametrize("level", [0, LEVELS - 1])
def test_fp8_weights_in_tiles(level, tiled) -> None:
    """Rows of the inputs are rounded each with a scale of its own; and there is no border, so `x A^T` is kept."""
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", "+quantizer=fp8", "kernels=[reference]"]
    ours = runs.loaded(words).model
    runs.shake(ours, trainable_only=True)
    keep(ours, level)
    found = []
    for rows in (0, TILE):
        tiled(rows)
        found.append(manual(ours, runs.batch_for(ours)))
    assert_close(*found)


@pytest.mark.parametrize("level", [0, LEVELS - 1])
def test_nf4_weights_are_dequantized_once_for_all_tiles(level, tiled, kernel_calls) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", "+quantizer=bnb_nf4", "kernels=[reference]"]
    ours = runs.loaded(words).model
    runs.shake(ours, trainable_only=True)
    keep(ours, level)
    data, found, calls = runs.batch_for(ours), [], []
    for rows in (0, TILE):
        tiled(rows)
        counted = kernel_calls(ours, "nf4_dequantize")
        found.append(manual(ours, data))
        calls.append(len(counted))
    assert_close(*found)
    assert calls[0] == calls[1] > 0


@pytest.fixture
def kernel_calls(monkeypatch) -> Any:
    """From a model and the name of a step to a list that grows with each call of it."""

    def counting(model: Any, name: str) -> list[None]:
        calls: list[None] = []
        structure = layers(model)[0].forward.keywords["structure"]
        step = getattr(structure.ops, name)

        def counted(*args: Any, **more: Any) -> Any:
            calls.append(None)
            return step(*args, **more)

        for layer in layers(model):
            ops = layer.forward.keywords["structure"].ops
            object.__setattr__(ops, name, counted)
        return calls

    return counting


# Memory ------------------------------------------------------------------------------------------------------------

WIDE = {"intermediate_size": 600}
ROWS, LENGTH = 4, 64


def measured(
    model: Any, tile: int, tiled: Any, grads: bool = True, shape: tuple[int, int] = (ROWS, LENGTH)
) -> tuple[Live, Live]:
    """Tensors of a forward through the layers, and of its backward."""
    tiled(tile)
    data = batch(*shape)
    with torch.set_grad_enabled(grads), Live() as forward:
        out = base(model).model(data["input_ids"]).last_hidden_state
    if not grads:
        return forward, Live()
    dout = torch.ones_like(out)
    with Live() as backward:
        out.backward(dout)
    return forward, backward


@pytest.mark.parametrize(("family", "lora"), [("llama", None), ("qwen3", None), ("gemma2", None), ("llama", False)])
def test_nothing_as_wide_as_the_mlp_is_there_for_all_tokens(family, lora, tiled) -> None:
    _, ours = pair(family, lora=lora, **WIDE)
    keep(ours, 0)
    wide = ROWS * LENGTH * WIDE["intermediate_size"]
    for passes in (measured(ours, 32, tiled), measured(ours, 32, tiled, grads=False)[:1]):
        assert max(live.largest for live in passes) < wide
    for live in measured(ours, 0, tiled):
        assert live.largest >= 2 * wide, "the whole has them: what is counted would show"


def test_tiles_save_what_they_are_said_to(tiled, monkeypatch) -> None:
    maths.needs_triton("triton")  # plain PyTorch has temporaries of its own
    for name, value in (("BYTES", 2 * 1200 * 16), ("FEWEST", 16), ("MULTIPLE", 16)):
        monkeypatch.setattr(tiles, name, value)
    _, ours = pair("llama", "triton", {"r": 4, "target_modules": ["q_proj"]}, num_hidden_layers=1, **WIDE)
    keep(ours, 0)
    recompute = layers(ours)[0].ftcore_recompute
    recompute.width = 4
    assert recompute._tile(2 * 32) == 16
    whole, in_tiles = (measured(ours, rows, tiled, shape=(2, 32))[1].peak for rows in (0, 16))
    said = recompute.workspace(2, 32) - recompute.workspace(2, 32, True)
    # On an H200 it was 17 % less than said; why is not known.
    assert whole - in_tiles == pytest.approx(said, rel=0.2 if torch.cuda.is_available() else 0.1)
    assert in_tiles < 0.5 * whole


# How many rows -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 300_000), st.integers(64, 120_000))
def test_tiles_are_neither_too_small_nor_too_large(tokens, width) -> None:
    rows = tiles.rows_of_a_tile(tokens, width)
    least = max(tiles.BYTES // (2 * width), tiles.FEWEST)
    if not rows:
        assert tokens < 2 * least
        return
    assert rows % tiles.MULTIPLE == 0
    assert tiles.FEWEST <= rows <= 1.5 * least + tiles.MULTIPLE
    number = -(-tokens // rows)
    assert number >= 2
    assert 0 <= number * rows - tokens < (tokens // tiles.FEWEST) * tiles.MULTIPLE, "the last lacks what was rounded up"


@pytest.mark.parametrize(
    ("tokens", "width", "rows"),
    [(32768, 16384, 4096), (32768, 28672, 2560), (32768, 57344, 2048), (8191, 16384, 0), (8192, 16384, 4096)],
)
def test_rows_of_real_layers(tokens, width, rows) -> None:
    assert tiles.rows_of_a_tile(tokens, width) == rows


@pytest.mark.parametrize("mode", ["least", "off", "auto"])
def test_memory_says_who_works_in_tiles(mode, monkeypatch) -> None:
    """On a CPU `auto` has all the memory that it wants; without gradients everybody does."""
    for name in ("BYTES", "FEWEST", "MULTIPLE"):
        monkeypatch.setattr(tiles, name, 16)
    model, _ = ftcore.load(["+model=llama", "model.tiny=true", "kernels=[reference]", f"memory={mode}"])
    hidden = torch.zeros(4, 16, 8)
    for layer in layers(model):
        assert layer.ftcore_recompute.tile(hidden) == (16 if mode == "least" else 0)
        with torch.no_grad():
            assert layer.ftcore_recompute.tile(hidden) == 16


# Sums --------------------------------------------------------------------------------------------------------------


def test_sums_are_rounded_once() -> None:
    """A thousand parts of bfloat16, each too small to change a bfloat16 sum."""
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    sums, grads = Sums(), Gradients()
    sums[parameter] = torch.full((3,), 256.0, dtype=torch.bfloat16)
    for _ in range(1000):
        sums[parameter] = torch.full((3,), 0.5, dtype=torch.bfloat16)
    sums[parameter] = None
    sums.hand_over(grads)
    (found,) = grads.of([parameter])
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [756.0] * 3
