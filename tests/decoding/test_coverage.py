"""Which families `generator=fast` computes, in which way, and that it writes what transformers writes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generators_on_tiny import Both, both, logprobs_of, prompts_of

from ftcore import Sampling
from ftcore import hooks as h
from ftcore.catalog import installed
from ftcore.testing import runs
from ftcore.vision import ImageRowTokenizer
from ftcore_kernels.decoding import convolution, families, modules
from ftcore_kernels.decoding.halves import Half
from ftcore_kernels.decoding.layers import Layers
from ftcore_kernels.decoding.modules import Own
from ftcore_kernels.decoding.prompts import Packed
from ftcore_kernels.decoding.run import LOOK
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores, decode_attention

GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = (
    "gemma", "gemma2", "gemma3", "gemma3_vision", "llama", "mistral", "orpheus", "phi3", "pixtral", "qwen2",
    "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl", "smollm2",
)  # fmt: skip
"""Whose layers compute by the steps of the manual layer."""
HALVES = ("mixtral", "qwen3_moe")
"""Whose attention does, and whose mixture of experts computes by itself."""
MODULES = {
    "deepseek_v3": "latent_attention",
    "gemma3n": "alternating_updates, shared_keys_and_values, value_norm",
    "gpt_oss": "attention_sinks, half_width_rope, weight_in_float32",
    "llama4": "chunked_attention, interleaved_rope, norm_after_rope",
    "lfm2": "own_projection_names, short_convolution",
    "mllama": "other_dropout_name",
}
"""Whose own layers compute around ftcore's attention, to the traits that there are no steps for."""
NO_TEXT = ("bert", "csm", "modernbert", "whisper")
"""Who write no text, and whose trainers ask for no completions."""
SLOWLY_WITH_IMAGES = ("pixtral", "qwen2_vl", "qwen3_vl")
WITH_IMAGES = ("gemma3_vision", "qwen2_5_vl", *SLOWLY_WITH_IMAGES)


@functools.cache
def tiny(family: str) -> Both:
    return both("kernels=[reference]", family=family)


def way(made: Both) -> Any:
    """What the generator computes with, or None where it leaves that to transformers."""
    engine = made.fast._ready()
    return None if engine is None else engine._layers


def same(made: Both, *lengths: int) -> None:
    prompts = prompts_of(*lengths)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    said = [what for what in made.fast._said if what.startswith("transformers")]
    assert not said


def test_every_family_is_listed() -> None:
    found = {option.name for option in installed().options("model") if option.dist == "ftcore"}
    assert found == {*STEPS, *HALVES, *MODULES, *NO_TEXT}


@pytest.mark.parametrize("family", NO_TEXT)
def test_these_are_asked_for_no_completions(family: str) -> None:
    refused = runs.refusals([f"+model={family}", "model.tiny=true", "+trainer=grpo", "generator=fast"])
    assert "trainer" in [problem.key for problem in refused]


@pytest.mark.parametrize("family", [*STEPS, *HALVES])
def test_computed_by_steps(family: str) -> None:
    computed = way(tiny(family))
    assert isinstance(computed, Layers)
    assert families.way(tiny(family).fast._plan.family) == (families.HALVES if family in HALVES else families.STEPS)
    assert all(isinstance(place.layer, Half) == (family in HALVES) for place in computed.places)
    same(tiny(family), 3, 17, 9)


@pytest.mark.parametrize("family", MODULES)
def test_computed_by_the_family_s_own_layers(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny(family)
    made.fast._said.clear()
    assert isinstance(way(made), Own)
    assert families.way(made.fast._plan.family) == families.MODULES
    expected = f"the layers' own modules compute, because there are no steps for layers with {MODULES[family]}"
    assert capsys.readouterr().out.strip() == f"generator: {expected}"
    same(made, 3, 17, 9)


def test_what_is_not_known_is_left_to_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """A family of somebody else's with a state that nobody here keeps."""
    made, prompts = both("kernels=[reference]"), prompts_of(5, 9)
    roles = tuple(replace(role, traits=role.traits | {"their_memory"}) for role in made.fast._plan.family.roles)
    made.fast._plan = replace(made.fast._plan, family=replace(made.fast._plan.family, roles=roles))
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert families.way(made.fast._plan.family) is None
    said = (
        "generator: transformers writes the completions, because layers with their_memory are not completed by ftcore"
    )
    assert capsys.readouterr().out.strip().endswith(said)
    made.fast.generate(prompts, GREEDY)
    assert "transformers writes" not in capsys.readouterr().out, "once is enough"


# Beyond one size ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", [*STEPS, *HALVES, *MODULES])
@pytest.mark.parametrize("words", ["kernels=[]", "adapter.variant=dora", "adapter=full"])
def test_whatever_computes_and_is_trained(family: str, words: str) -> None:
    # DoRA is refused on experts.
    mixed = (*HALVES, "deepseek_v3", "gpt_oss", "llama4")
    more = ["adapter.targets=[q_proj,o_proj]"] if "dora" in words and family in mixed else []
    made = both(words, *more, family=family)
    same(made, 3, 17, 1, 64)
    assert made.fast._covered


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("words", ["adapter.variant=dora", "+quantizer=bnb_nf4"])
def test_adapters_and_weights_that_there_are_no_steps_for(
    words: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variant of LoRA; 4-bit weights too, had the steps not known them."""
    made = both(words, "adapter.targets=[q_proj,o_proj]", family=family)
    if "nf4" in words:
        monkeypatch.setattr("ftcore_kernels.layers.decoder.sources.is_nf4", lambda base: False)
    assert isinstance(way(made), Own)
    same(made, 9, 4)


@pytest.mark.parametrize("family", ["mixtral"])
def test_4_bit_attention_beside_a_mixture(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = both("+quantizer=bnb_nf4", family=family)
    same(made, 9, 4)
    engine: Any = made.fast._engine
    monkeypatch.setattr(engine, "_limits", type(engine._limits)(8, 100, lambda: 2**30))
    assert isinstance(way(made), Layers)
    same(made, 9, 4)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_windows_and_chunks_that_are_shorter_than_the_rows(family: str) -> None:
    """Prompts and completions that reach over several of them."""
    made = tiny(family)
    config = made.fast._base.config
    if family == "llama4":
        config.attention_chunk_size = 8
    else:
        assert config.sliding_window == 8
    same(made, 21, 8, 30)


def test_attention_that_asks_where_a_token_stands_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 4 makes scores larger from some place on, by the place in the row: transformers completes such prompts."""
    made = both("kernels=[reference]", family="llama4")
    for module in made.model.modules():
        if hasattr(module, "floor_scale"):
            module.floor_scale = 24
    same(made, 4, 11, 13)
    prompts = prompts_of(4, 20)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert "transformers writes" in capsys.readouterr().out
    made.fast._said.clear()
    same(made, 4, 11)


def test_layers_with_a_state_of_their_own_are_refused() -> None:
    """Even if their family says nothing: an attention that is not transformers' is never asked."""
    made = tiny("llama")
    roles = made.fast._plan.family.roles
    attention = next(role for role in roles if role.name == "attention")
    with pytest.raises(Uncovered, match="do not ask transformers"):
        modules.read(made.fast._base, [attention], torch.device("cpu"), lambda: None)


SCORES = [Scores(0.3), Scores(0.3, window=5), Scores(0.3, softcap=2.0), Scores(0.3, chunk=4), Scores(0.3, 3, 2.0)]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("sinks", [False, True])
def test_prompts_are_read_as_if_token_by_token(scores: Scores, sinks: bool) -> None:
    drawn = torch.Generator().manual_seed(3)
    lengths = (7, 1, 12)
    q, k, v = (torch.randn((1, heads, sum(lengths), 8), generator=drawn) for heads in (4, 2, 2))
    scores = scores._replace(sinks=torch.randn(4, generator=drawn) if sinks else None)
    found = Packed(lengths, torch.device("cpu")).attend(q, k, v, scores)
    start = 0
    for length in lengths:
        keys, values = torch.zeros((2, 1, 2, length, 8))
        for at in range(length):
            token = [x[:, :, start + at, None] for x in (q, k, v)]
            expected = decode_attention(*token, keys, values, torch.tensor([at]), scores)
            torch.testing.assert_close(found[:, start + at, None], expected, rtol=1e-5, atol=1e-5)
        start += length


def test_convolutions_of_prompts_and_steps_are_one_convolution() -> None:
    drawn = torch.Generator().manual_seed(4)
    lengths, width, size = (1, 6, 2), 5, 3
    x, filters = (torch.randn(shape, generator=drawn) for shape in ((1, sum(lengths), width), (width, size)))
    new = torch.randn((4, 2, width), generator=drawn)
    state = torch.full((4, size - 1, width), torch.nan)  # of rows 3, 0 and 2; nobody is in row 1
    rows = torch.tensor([3, 0, 2]).repeat_interleave(torch.tensor(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])
    read = convolution.packed(x, filters, state, rows, places)
    written = [convolution.stepped(new[:, at, None], filters, state) for at in range(2)]
    for row, first, length in ((3, 0, 1), (0, 1, 6), (2, 7, 2)):
        whole = torch.cat((x[0, first : first + length], new[row])).T[None]
        expected = F.conv1d(whole, filters[:, None], padding=size - 1, groups=width)[0, :, : length + 2].T
        found = torch.cat((read[0, first : first + length], *(step[row] for step in written)))
        torch.testing.assert_close(found, expected)


# Images ---------------------------------------------------------------------------------------------------------------


def shown(family: str, made: Both, *sizes: tuple[int, int], answer: str) -> tuple[list[int], Mapping[str, Any]]:
    """A prompt with images, and what the model takes of them."""
    words = [f"+model={family}", "model.tiny=true", "model.dtype=float32", "data=images", "+trainer=sft"]
    hooks, plan = runs.prepared(words)
    assert plan.family.vision is not None
    tokenizer = made.plain._tokenizer
    rows = list(ImageRowTokenizer(tokenizer, plan.family.vision, 1000)(runs.row_with_images(*sizes, answer=answer)))
    batch = hooks.first(h.ftcore_make_collator, plan=plan, tokenizer=tokenizer)(rows)
    ids: list[int] = batch.pop("input_ids")[0].tolist()
    return ids, {name: value for name, value in batch.items() if name not in ("attention_mask", "labels")}


def asked(family: str, made: Both) -> tuple[list[list[int]], list[Mapping[str, Any] | None]]:
    """One image twice, two images, and a prompt without one."""
    one, two = shown(family, made, (64, 96), answer="A"), shown(family, made, (64, 64), (96, 60), answer="Or noise")
    prompts = [one, one, two, (prompts_of(6)[0], None)]
    return [ids for ids, _ in prompts], [media for _, media in prompts]


@pytest.mark.parametrize(
    "family", ["gemma3_vision", "qwen2_5_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOWLY_WITH_IMAGES)]
)
def test_prompts_with_images(family: str) -> None:
    made = tiny(family)
    assert families.images(made.fast._plan.family)
    prompts, media = asked(family, made)
    found = made.fast.generate(prompts, GREEDY, media)
    assert found.ids == made.plain.generate(prompts, GREEDY, media).ids
    assert not [what for what in made.fast._said if what.startswith("transformers")]
    assert made.fast.generate(prompts, GREEDY).ids[2] != found.ids[2], "the images matter"
    assert found.logprobs is not None
    ids, given = prompts[2], media[2]
    assert given is not None
    more = {
        name: torch.cat((value, value.new_zeros((1, len(found.ids[2])))), 1) if "type_ids" in name else value
        for name, value in given.items()
    }
    expected = logprobs_of(made.model, ids, found.ids[2], 1.0, **more)
    torch.testing.assert_close(torch.tensor(found.logprobs[2]), expected, rtol=1e-4, atol=1e-4)


def test_images_that_layers_attend_to_are_transformers_s(capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny("mllama")
    assert not families.images(made.fast._plan.family)
    prompts, media = asked("mllama", made)
    made.fast._said.clear()
    assert made.fast.generate(prompts, GREEDY, media).ids == made.plain.generate(prompts, GREEDY, media).ids
    assert "MllamaTextCrossAttention attends to something else" in capsys.readouterr().out
    made.fast._said.clear()
    same(made, 5, 8)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("lengths", [(300,), (70, 1, 200, 29)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "scores", [Scores(0.2), Scores(0.2, window=50), Scores(0.2, softcap=2.0), Scores(0.2, chunk=64)]
)
def test_prompts_by_the_gpu_s_kernels(scores: Scores, sinks: bool, lengths: tuple[int, ...]) -> None:
    """In bf16, against plain PyTorch in fp32."""
    drawn = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, heads, 300, 64), generator=drawn).bfloat16() for heads in (8, 2, 2))
    logits = torch.randn(8, generator=drawn) if sinks else None
    expected = Packed(lengths, torch.device("cpu")).attend(
        q.float(), k.float(), v.float(), scores._replace(sinks=logits)
    )
    scores = scores._replace(sinks=None if logits is None else logits.cuda())
    found = Packed(lengths, torch.device("cuda")).attend(q.cuda(), k.cuda(), v.cuda(), scores)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", [*STEPS, *HALVES, *MODULES])
def test_recorded_or_not_it_is_the_same(family: str) -> None:
    made = both(family=family)
    prompts, sampling = prompts_of(3, 17, 1, 64), Sampling(max_new_tokens=20, temperature=0.0)
    first = made.fast.generate(prompts, sampling).ids
    assert made.fast._engine is not None
    made.fast._engine.may_record = False
    assert made.fast.generate(prompts, sampling).ids == first == made.plain.generate(prompts, sampling).ids


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", HALVES)
def test_mixtures_are_recorded_in_bf16(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = both("model.dtype=bfloat16", family=family)
    prompts, sampling = prompts_of(3, 17, 1, 64), Sampling(max_new_tokens=20, temperature=0.0)
    first = made.fast.generate(prompts, sampling)
    assert "cannot be recorded" not in capsys.readouterr().out
    made.fast._engine.may_record = False  # type: ignore[union-attr]
    assert made.fast.generate(prompts, sampling).ids == first.ids


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_images_on_a_gpu(family: str) -> None:
    made = both(family=family)
    prompts, media = asked(family, made)
    assert made.fast.generate(prompts, GREEDY, media).ids == made.plain.generate(prompts, GREEDY, media).ids


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_nothing_is_left_when_a_pass_fails(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the steps, and by the layers' own modules."""
    made, prompts = both("kernels=[reference]", family=family), prompts_of(9)

    def state() -> list[Any]:
        config = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in made.model.modules()]
        return [config, *((sorted(vars(m)), vars(m).get("forward")) for m in made.model.modules())]

    before = state()
    monkeypatch.setattr("ftcore_kernels.decoding.cache.Cache.write", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        made.fast.generate(prompts, GREEDY)
    assert state() == before


@pytest.mark.gpu
@ON_GPU
def test_a_step_that_cannot_be_recorded_leaves_the_stream_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It asks the host, which no recording may."""
    made, prompts = both(), prompts_of(9, 4)
    greedy = replace(GREEDY, max_new_tokens=3 * LOOK)  # fewer are not worth a recording
    expected = made.fast.generate(prompts, greedy).ids
    made.fast._engine = None
    head, stream = made.model.get_output_embeddings(), torch.cuda.current_stream()
    asking = head.register_forward_hook(lambda module, args, out: out.sum().item() and None)
    try:
        assert made.fast.generate(prompts, greedy).ids == expected
    finally:
        asking.remove()
    assert torch.cuda.current_stream() == stream
    assert "launched one by one" in capsys.readouterr().out
