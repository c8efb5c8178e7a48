"""What records, flights and homes decide: on CUDA graphs, and on a CPU with a stand-in that launches once more."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from decoders import DEVICE
from peft import LoraConfig, get_peft_model

import ftcore
from ftcore_kernels.layers.decoder import attention, graphs


class Again:
    """In place of a CUDA graph: a replay runs what was recorded, into the same tensors."""

    def replay(self) -> None:
        self.launches()


POOLS: list[tuple[int, Any]] = []
"""Layer and memory of each recording since the test began."""


class Handle:
    """What the allocator knows of a pool: its graphs."""

    def __init__(self) -> None:
        self._graphs: list[weakref.ref[Again]] = []

    def take(self, graph: Again) -> None:
        """As the allocator does it while a part of the memory is held: never again after the last graph is gone."""
        assert not self._graphs or any(graph() is not None for graph in self._graphs), "use_count > 0"
        self._graphs.append(weakref.ref(graph))


def _record(record: graphs.Record, graph: Again, launches: Any) -> None:
    pool = record.shared.pool_of(record.is_late()).handle(graph)
    pool.take(graph)
    POOLS.append((record.index, pool))

    forward, whole = launches == record._steps_forward, weakref.WeakMethod(launches)  # a graph keeps no record alive

    def run() -> None:
        launch = whole()
        assert launch is not None
        record = launch.__self__
        out, grads = record.out, record.grads
        with torch.no_grad():
            launch()
        # A graph writes where it wrote when it was recorded.
        if forward and out is not None:
            record.out = out.copy_(record.out)
        if not forward and grads:
            record.grads = [
                old if old is None else old.copy_(new) for old, new in zip(grads, record.grads, strict=True)
            ]

    run()
    ran = [True]  # recording executes nothing on a GPU: the replay that follows stands for this run
    graph.launches = lambda: ran.clear() if ran else run()


class Shared(graphs.Shared):
    def __init__(self, device: torch.device) -> None:
        self._begin()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        return
    monkeypatch.setattr(graphs, "Shared", Shared)
    monkeypatch.setattr(graphs.Record, "_record", _record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", Handle)
    POOLS.clear()
    monkeypatch.setattr(attention.Differentiated, "recordable", True)


def load(records: bool) -> Any:
    torch.manual_seed(0)
    model, _ = ftcore.load(["+model=qwen3", "model.tiny=true", "memory=off", "graphs=off"])  # `follow` below records
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if records:
        follow(model)
    return model.train()


def follow(model: Any) -> None:
    layers = [module.ftcore_recompute for module in model.modules() if hasattr(module, "ftcore_recompute")]
    for before, layer in zip([None, *layers], layers, strict=False):
        layer.follow(before)


def records(model: Any) -> set[int]:
    layers = [module.ftcore_recompute for module in model.modules() if hasattr(module, "ftcore_recompute")]
    return {len(layer.graphs._records) if layer.graphs else 0 for layer in layers}


def batch(seed: int, rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def train(model: Any, shapes: list[tuple[int, int]], micro: int) -> list[torch.Tensor]:
    found = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for step, shape in enumerate(shapes):
        for part in range(micro):
            # Micro-batches of a step differ in length, so that gradients of several records add up.
            ids = batch(10 * step + part, shape[0], shape[1] + 4 * (part % 2))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append(loss.detach().clone())
        found += [parameter.grad.clone() for parameter in trained]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_replay_equals_a_launch(micro: int) -> None:
    shapes = [(2, 16)] * 5 + [(2, 16), (3, 8)] * 5
    replayed = load(True)
    expected, found = train(load(False), shapes, micro), train(replayed, shapes, micro)
    assert records(replayed) == {2 if micro == 1 else 4}
    assert all(map(torch.equal, expected, found))


class ByDocument(attention.Differentiated):
    """In place of FlashAttention: what it does depends on offsets that are others in every batch."""

    def __init__(self, scale: float, documents: attention.Documents) -> None:
        super().__init__(self._attend)
        self.scale, self.tables = scale, (documents.offsets,)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        token = torch.arange(q.shape[2])
        own = torch.searchsorted(self.tables[0].long(), token, right=True)
        seen = (own[:, None] == own) & (token[:, None] >= token)
        options = {"attn_mask": seen, "scale": self.scale, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="autograd's backward of this attention cannot be recorded")
def test_packed_documents_are_others_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention.choice, "fused", lambda like, dim, scale, window, documents: ByDocument(scale, documents)
    )
    found: list[list[torch.Tensor]] = []
    for replays in (False, True):
        model, seen = load(replays), []
        for step in range(8):
            ids, cut = batch(step, 1, 24), 3 + 2 * step
            where = torch.cat([torch.arange(length) for length in (cut, 24 - cut)])[None]
            loss = model(input_ids=ids, labels=ids, position_ids=where).loss
            loss.backward()
            seen += [loss.detach(), *gradients(model)]
        assert records(model) == ({1} if replays else {0})
        found.append(seen)
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][len(found[0]) // 2])


def gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.fixture
def models() -> tuple[Any, Any]:
    """One that launches and one that has recorded, with the same weights."""
    pair = load(False), load(True)
    for model in pair:
        train(model, [(2, 16)] * 4, 1)
    assert records(pair[1]) == {1}
    return pair


def test_a_second_forward_before_the_first_backward_is_launched(models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        first = model(input_ids=batch(1), labels=batch(1)).loss
        second = model(input_ids=batch(2), labels=batch(2)).loss
        (first + 3 * second).backward()
        found.append(gradients(model))
    assert all(map(torch.equal, *found))


def test_a_dropped_forward_does_not_block_the_next(models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        model(input_ids=batch(1), labels=batch(1)).loss.item()
        model(input_ids=batch(2), labels=batch(2)).loss.backward()
        found.append(gradients(model))
    assert all(map(torch.equal, *found))
    layer = next(module.ftcore_recompute for module in models[1].modules() if hasattr(module, "ftcore_recompute"))
    assert not layer.graphs._in_flight()


def test_an_adapter_that_is_off_is_not_the_recorded_one(models: tuple[Any, Any]) -> None:
    losses = []
    for model in models:
        with model.disable_adapter():
            losses.append(model(input_ids=batch(1), labels=batch(1)).loss.detach())
        losses.append(model(input_ids=batch(1), labels=batch(1)).loss.detach())
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])
    assert not torch.equal(losses[0], losses[1])


def test_moved_parameters_are_recorded_anew(models: tuple[Any, Any]) -> None:
    for parameter in models[1].parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    found = [train(model, [(2, 16)] * 3, 1) for model in models]
    assert all(map(torch.equal, *found))


def test_a_second_backward_is_refused(models: tuple[Any, Any]) -> None:
    loss = models[1](input_ids=batch(1), labels=batch(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


def test_not_more_shapes_than_there_is_room_for() -> None:
    model = load(True)
    shapes = [(2, 4 + length) for length in range(graphs.SHAPES + 2) for _ in range(graphs.SEEN_BEFORE + 1)]
    train(model, shapes, 1)
    assert records(model) == {graphs.SHAPES}


def test_a_changed_scale_is_not_the_recorded_one(models: tuple[Any, Any]) -> None:
    losses = []
    for model in models:
        before = model(input_ids=batch(1), labels=batch(1)).loss.detach()
        for module in model.modules():
            if "lora_A" in module._modules:
                module.scaling["default"] *= 3
        losses.append((before, model(input_ids=batch(1), labels=batch(1)).loss.detach()))
    assert torch.equal(losses[0][1], losses[1][1])
    assert not torch.equal(*losses[1])


def another_adapter(model: Any) -> None:
    """Of the same name."""
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def a_trained_norm(model: Any) -> None:
    model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)


def a_trained_norm_of_heads(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.k_norm.weight.requires_grad_(True)


def other_weights(model: Any) -> None:
    linear = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)


def other_factors(model: Any) -> None:
    for module in model.modules():
        if "lora_B" in module._modules:
            factor = module.lora_B["default"]
            factor.weight = torch.nn.Parameter(factor.weight.detach() * 3)


@pytest.mark.parametrize(
    "change", [another_adapter, a_trained_norm, a_trained_norm_of_heads, other_weights, other_factors]
)
def test_a_layer_that_changed_is_not_the_recorded_one(change: Any, models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        train(model, [(2, 16)] * 4, 1)
        change(model)
        found.append(train(model, [(2, 16)] * 4, 1))
    assert records(models[1]) != {0}
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at the stand-in's memory")
@pytest.mark.parametrize(("change", "apart"), [(a_trained_norm, {0}), (other_weights, {1}), (other_factors, {0, 1})])
def test_who_records_later_than_others_writes_none_of_their_memory(change: Any, apart: set[int]) -> None:
    """What they keep counts as free in the common pool once their backward is recorded."""
    model = load(True)
    train(model, [(2, 16)] * 4 + [(3, 8)] * 4, 1)
    layers = set(range(len({index for index, _ in POOLS})))
    assert {index for index, _ in POOLS} == layers
    assert len({id(pool) for _, pool in POOLS}) == 1
    common = POOLS[0][1]
    POOLS.clear()
    change(model)
    train(model, [(2, 16)] * 4, 1)
    late = {index for index, pool in POOLS if pool is not common}
    assert late == {index for index, _ in POOLS} == apart
    assert len({id(pool) for _, pool in POOLS}) == 1, "of one batch"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at the stand-in's memory")
def test_every_batch_of_late_recordings_has_memory_of_its_own() -> None:
    model = load(True)
    train(model, [(2, 16)] * 4, 1)
    POOLS.clear()
    for change in (other_weights, a_trained_norm):
        change(model)
        train(model, [(2, 16)] * 4, 1)
    assert len({id(pool) for _, pool in POOLS}) == 2


@pytest.mark.parametrize("micro", [1, 2])
def test_gradients_add_up_also_where_records_are_forgotten_on_the_way(micro: int) -> None:
    """Of a forward that was replayed before: its backward writes where gradients were left."""
    found = []
    for replays in (False, True):
        model = load(replays)
        train(model, [(2, 16)] * 4, 1)
        for step in range(micro):
            model(input_ids=batch(step), labels=batch(step)).loss.backward()
        loss = model(input_ids=batch(9), labels=batch(9)).loss
        for module in model.modules():
            if replays and hasattr(module, "ftcore_recompute"):
                module.ftcore_recompute.forget()
        loss.backward()
        found.append(gradients(model))
    assert all(map(torch.equal, *found))


def test_factors_that_are_trained_later_get_gradients(models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        firsts = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
        for parameter in firsts:
            parameter.requires_grad_(False)
        train(model, [(2, 16)] * 4, 1)
        for parameter in firsts:
            parameter.requires_grad_(True)
        found.append(train(model, [(2, 16)] * 4, 1))
    assert all(map(torch.equal, *found))


def test_positions_of_each_row_are_not_those_of_all_rows(models: tuple[Any, Any]) -> None:
    """Tables of angles have another shape then; a mask says that there is one document a row."""
    found, ids, all_read = [], batch(9), torch.ones((2, 16), dtype=torch.int64, device=DEVICE)
    where = (3 * torch.arange(16, device=DEVICE)).expand(2, 16).contiguous()
    for model in models:
        for _ in range(4):
            model(input_ids=ids, labels=ids, attention_mask=all_read).loss.backward()
        losses = []
        for more in ({}, {"position_ids": where}):
            losses.append(model(input_ids=ids, labels=ids, attention_mask=all_read, **more).loss.detach())
        found.append([*losses, *gradients(model)])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[1][0], found[1][1])


def test_norms_that_peft_trains_whole_are_recorded(tmp_path: Any) -> None:
    base = load(False).unload()
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}
    get_peft_model(base, LoraConfig(**options)).save_pretrained(tmp_path)
    found = []
    for replays in (False, True):
        model, _ = ftcore.load(
            ["+model=qwen3", "model.tiny=true", "memory=off", "graphs=off", f"adapter.path='{tmp_path}'"]
        )
        follow(model) if replays else None
        found.append(train(model.train(), [(2, 16)] * 4, 1))
        assert records(model) == ({1} if replays else {0})
    assert len(found[0]) > 20
    assert all(map(torch.equal, *found))


def test_what_is_forgotten_is_recorded_once_more_and_then_never(models: tuple[Any, Any]) -> None:
    layers = [module.ftcore_recompute for module in models[1].modules() if hasattr(module, "ftcore_recompute")]
    for still in (1, 0):
        for layer in layers:
            layer.forget()
        assert records(models[1]) == {0}
        found = [train(model, [(2, 16)] * 4, 1) for model in models]
        assert all(map(torch.equal, *found))
        assert records(models[1]) == {still}


def test_records_of_an_adapter_that_is_gone_leave_their_place() -> None:
    model = load(True)
    shapes = [(2, 4 + length) for length in range(graphs.SHAPES) for _ in range(graphs.SEEN_BEFORE + 1)]
    train(model, shapes, 1)
    another_adapter(model)
    train(model, shapes, 1)
    assert records(model) == {graphs.SHAPES}
    alive = {id(parameter) for parameter in model.parameters()}
    layers = [module.ftcore_recompute for module in model.modules() if hasattr(module, "ftcore_recompute")]
    for layer in layers:
        assert {id(p) for record in layer.graphs._records.values() for p in record.parameters} <= alive
        assert {id(p) for p in layer.graphs._homes} <= alive
