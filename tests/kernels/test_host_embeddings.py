"""Frozen embedding and head in host memory: the same numbers to the last bit, and nothing of them left on the GPU."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lm_head import DEVICE, ROLE, batch, install, tiny  # noqa: F401  install is a fixture
from torch.multiprocessing.reductions import StorageWeakRef

from ftcore import memory, merge, pipeline
from ftcore.config import Graphs, Memory
from ftcore.memory import host_weights_of, leave_in_host_memory
from ftcore.patching import unpatch
from ftcore.specs import Passes
from ftcore.testing import runs
from ftcore_kernels.layers import host_weights
from ftcore_kernels.layers.host_weights import HOST, HostWeight
from ftcore_kernels.layers.lm_head_parts import head_of

CUDA = DEVICE.type == "cuda"
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def adapted(tied: bool = False, **lora):
    model = get_peft_model(tiny(tie_word_embeddings=tied), LoraConfig(**LORA | lora))
    runs.shake(model, trainable_only=True)
    return model.train()


@pytest.fixture
def two(install):  # noqa: F811
    """A model as it is, and the same whose embedding and head left."""
    stays = adapted()
    leaves = copy.deepcopy(stays)
    for model in (stays, leaves):
        install(model.get_base_model(), ROLE)
    sizes = [leaves.get_base_model().get_submodule(name).weight.nbytes for name in ("model.embed_tokens", "lm_head")]
    (weights,) = host_weights_of(leaves)
    assert weights.leave() == sum(sizes)
    return stays, leaves


def gradients(model, of) -> list[torch.Tensor]:
    model.zero_grad()
    of(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


ASKED = {
    "loss": lambda model: model(**batch()).loss,
    "fused loss": lambda model: model(**batch(), fused_loss=True).loss,
    "log-probabilities": lambda model: model(**batch(), fused_lm_head=True).log_probs.square().sum(),
    "logits": lambda model: model(input_ids=batch()["input_ids"]).logits.square().sum(),
}


@pytest.mark.parametrize("asked", ASKED)
def test_outputs_and_gradients_are_bitwise_the_same(asked, two) -> None:
    stays, leaves = two
    for _ in range(3):
        assert torch.equal(ASKED[asked](stays), ASKED[asked](leaves))
        assert all(map(torch.equal, gradients(stays, ASKED[asked]), gradients(leaves, ASKED[asked])))


def test_evaluation_and_generation_are_the_same(two, monkeypatch) -> None:
    stays, leaves = (model.eval() for model in two)
    copies = []
    here = HostWeight.here
    monkeypatch.setattr(HostWeight, "here", lambda self: copies.append(1) or here(self))
    with torch.no_grad():
        assert torch.equal(stays(**batch()).logits, leaves(**batch()).logits)
        ids = batch()["input_ids"]
        written = [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for model in (stays, leaves)]
    assert torch.equal(*written)
    assert len(copies) == 1, "every token fetched the head"
    assert leaves.get_base_model().lm_head.ftcore_host._held is not None
    leaves.train()(**batch(), fused_loss=True).loss.backward()
    assert leaves.get_base_model().lm_head.ftcore_host._held is None, "the copy for writing stayed while training"


@pytest.mark.parametrize("asked", ["loss", "fused loss", "log-probabilities"])
def test_no_copy_of_the_head_is_there_while_the_layers_work(asked, two, monkeypatch) -> None:
    _, model = two
    copies, seen = [], []
    here = HostWeight.here

    def watched(self: HostWeight) -> torch.Tensor:
        made = here(self)
        copies.append(StorageWeakRef(made.untyped_storage()))
        return made

    def look(where: str) -> None:
        seen.append((where, [not copy.expired() for copy in copies]))

    monkeypatch.setattr(HostWeight, "here", watched)
    layer = model.get_base_model().model.layers[-1]
    layer.register_forward_hook(lambda *_: look("forward"))
    layer.register_full_backward_pre_hook(lambda *_: look("backward"))
    for _ in range(2):
        gradients(model, ASKED[asked])
    look("end")
    forwards, backwards = [("forward", []), ("forward", [False])], [("backward", [False]), ("backward", [False] * 2)]
    assert seen == [forwards[0], backwards[0], forwards[1], backwards[1], ("end", [False] * 2)]


def test_parameters_keep_name_identity_and_values(install) -> None:  # noqa: F811
    model = adapted()
    install(model.get_base_model(), ROLE)
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    host_weights_of(model)[0].leave()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {p.device for p in after.values()} == {torch.device(DEVICE.type, 0 if CUDA else None)}
    assert model.device.type == DEVICE.type
    places = {name: p.data_ptr() for name, p in after.items()}
    model.to(DEVICE)  # as trainers do
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_copy_has_weights_of_its_own(two) -> None:
    """A trainer copies a model for a reference or for a mean of its weights."""
    stays, leaves = two
    made = copy.deepcopy(leaves)
    with torch.no_grad():
        head_of(leaves.get_base_model()).weight.zero_()
    for ask in ASKED.values():
        assert torch.equal(ask(stays), ask(made))


def test_a_merged_model_has_both(two) -> None:
    stays, leaves = (merge.merged_weights(model.get_base_model()) for model in two)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(leaves)
    assert set(stays) == set(leaves)
    assert all(torch.equal(value, leaves[name]) for name, value in stays.items())


def test_saved_and_loaded_again(two, tmp_path) -> None:
    _, model = two
    base = model.unload()
    base.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).to(DEVICE)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in base.state_dict().items())


def test_patches_come_off_with_the_weights_back(two) -> None:
    stays, leaves = two
    base = leaves.get_base_model()
    unpatch(leaves)
    assert not hasattr(base.lm_head, HOST)
    assert not hasattr(base.model.embed_tokens, HOST)
    assert "forward" not in vars(base.lm_head)
    unpatch(stays)
    assert all(map(torch.equal, gradients(stays, ASKED["loss"]), gradients(leaves, ASKED["loss"])))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda: adapted(tied=True), []),
        (lambda: adapted(modules_to_save=["embed_tokens"]), ["lm_head"]),
        (lambda: adapted(modules_to_save=["lm_head"]), ["model.embed_tokens"]),
        (lambda: adapted(trainable_token_indices={"embed_tokens": [1], "lm_head": [1]}), []),
        (lambda: adapted(target_modules=["q_proj", "lm_head"]), ["model.embed_tokens"]),
        (lambda: adapted(target_modules=["q_proj", "embed_tokens"]), ["lm_head"]),
        (lambda: tiny(), []),  # everything is trained
    ],
    ids=[
        "tied",
        "embedding trained",
        "head trained",
        "new tokens",
        "LoRA on the head",
        "LoRA on the embedding",
        "full",
    ],
)
def test_only_what_is_frozen_and_alone_leaves(change, names, install) -> None:  # noqa: F811
    model = change()
    base = getattr(model, "get_base_model", lambda: model)()
    install(base, ROLE)
    stays = copy.deepcopy(model)
    host_weights_of(model)[0].leave()
    assert [name for name, module in base.named_modules() if hasattr(module, HOST)] == names
    assert host_weights_of(model)[0].leave() == 0, "once is enough"
    assert all(map(torch.equal, gradients(stays, ASKED["loss"]), gradients(model, ASKED["loss"])))


def test_a_gpu_that_does_not_reach_the_host_keeps_its_weights(install, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(host_weights.HostWeight, "address", lambda self: None)
    model = adapted()
    install(model.get_base_model(), ROLE)
    assert host_weights_of(model)[0].leave() == 0
    assert not hasattr(model.get_base_model().lm_head, HOST)
    assert head_of(model.get_base_model()) is not None


def test_the_head_stays_where_completions_are_written(install) -> None:  # noqa: F811
    _, plan = runs.prepared(["+model=llama", "model.tiny=true", "+trainer=sft", "output_dir=nowhere"])
    plan = replace(plan, device=SimpleNamespace(kind="cpu"), run=replace(plan.run, memory=Memory.offload))
    assert plan.trainer is not None
    for passes, head in ((None, True), (Passes(written=8), False)):
        model = adapted()
        install(model.get_base_model(), ROLE)
        leave_in_host_memory(replace(plan, trainer=replace(plan.trainer, passes=passes)), model)
        base = model.get_base_model()
        assert hasattr(base.model.embed_tokens, HOST)
        assert hasattr(base.lm_head, HOST) is head


@pytest.mark.parametrize("mode", Memory)
def test_offload_has_them_leave_and_counts_the_copy(mode, monkeypatch) -> None:
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", "+trainer=sft", "output_dir=nowhere"]
    hooks, plan = runs.prepared([*words, "kernels=[reference]"])
    plan = replace(plan, run=replace(plan.run, memory=mode, graphs=Graphs.off))
    model = pipeline.load(hooks, replace(plan, run=replace(plan.run, memory=Memory.off))).model
    base = model.get_base_model()
    if base.lm_head.weight is base.model.embed_tokens.weight:
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
    before = memory.head_bytes(model, 2, 16)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    memory.apply(replace(plan, device=SimpleNamespace(kind="cuda", memory=2**40)), model)
    away = mode is Memory.offload
    assert hasattr(base.lm_head, HOST) is hasattr(base.model.embed_tokens, HOST) is away
    assert memory.head_bytes(model, 2, 16) - before == away * base.lm_head.weight.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_reads_host_memory_by_its_address(dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(5003, 1000, device=DEVICE, dtype=dtype), requires_grad=False)
    whole, before = weight.detach().clone(), torch.cuda.memory_allocated()
    host = HostWeight(weight)
    reached = host.address()
    assert reached is not None, "the host's memory is not reached"
    weight.data = reached
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() >= whole.nbytes
    ids = torch.randint(5003, (7, 301), device=DEVICE)
    assert torch.equal(torch.nn.functional.embedding(ids, weight), whole[ids])
    assert torch.equal(weight.cpu(), whole.cpu())
    assert torch.equal(host.here(), whole)
    assert host.here().data_ptr() != weight.data_ptr()
    graph, found = torch.cuda.CUDAGraph(), torch.empty(0)
    with torch.cuda.graph(graph):  # lookups may be recorded
        found = torch.nn.functional.embedding(ids, weight)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(found, whole[ids])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_the_peak_of_a_step_has_neither(install) -> None:  # noqa: F811
    """A step's peak above the weights is at most a copy of the head more, and what is allocated falls by both."""
    peaks, there = [], []
    for away in (False, True):
        model = get_peft_model(tiny(vocab_size=20_001, hidden_size=512), LoraConfig(**LORA))
        install(model.get_base_model(), ROLE)
        both = sum(model.get_base_model().get_submodule(n).weight.nbytes for n in ("model.embed_tokens", "lm_head"))
        if away:
            assert host_weights_of(model)[0].leave() == both
        torch.cuda.synchronize()
        there.append(torch.cuda.memory_allocated())
        for _ in range(3):
            gradients(model, ASKED["fused loss"])
        torch.cuda.reset_peak_memory_stats()
        gradients(model, ASKED["fused loss"])
        peaks.append(torch.cuda.max_memory_allocated())
        del model
        gc.collect()
    assert there[0] - there[1] >= both - 2**21
    assert peaks[0] - peaks[1] >= both // 2 - 2**21
