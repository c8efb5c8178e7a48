"""GRPO, RLOO, Online DPO and GKD: ratios, masks, temperatures, splits into micro-batches, and what they are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preference_runs import gradients_of, held, move

import ftcore
from ftcore.answers import evaluating
from ftcore.testing import maths, runs
from ftcore_trainers._fused_head import base_of

STEP = ("trainer.max_completion_length=6", "trainer.global_batch=4", "sampling.max_new_tokens=2", "prompts=[]")
SGD = ("trainer.optimizer=sgd", "trainer.learning_rate=1.0", "trainer.schedule=constant", "trainer.warmup=0")
TINY = ("+model=qwen3", "model.tiny=true", "model.dtype=float32")


class Moved:
    """A plugin that moves the adapter off its start before training, and keeps the trainer."""

    trainer: Any

    @ftcore.hookimpl(wrapper=True)
    def ftcore_train(self, trainer: Any):
        self.trainer = trainer
        move(trainer.model)
        return (yield)


def after(*words: str) -> dict[str, torch.Tensor]:
    """What is trained, after a run."""
    seen = Moved()
    ftcore.run([*TINY, *SGD, *STEP, "trainer.max_grad_norm=0", "trainer.max_steps=1", *words], plugins=[seen])
    return {name: p.detach().clone() for name, p in seen.trainer.model.named_parameters() if p.requires_grad}


SPREAD = "def spread(completions, completion_ids):\n    return [sum(i) % 7 for i in completion_ids]\n"
SPLIT = {
    "grpo": ("+trainer=grpo", "trainer.num_generations=2", "trainer.loss_type=grpo"),
    "bnpo": ("+trainer=grpo", "trainer.num_generations=2", "trainer.loss_type=bnpo"),
    "dapo": ("+trainer=grpo", "trainer.num_generations=2"),
    "gspo": ("+trainer=grpo", "trainer.num_generations=2", "trainer.importance_sampling_level=sequence"),
    "dr_grpo": ("+trainer=grpo", "trainer.num_generations=2", "trainer.loss_type=dr_grpo"),
    "rloo": ("+trainer=rloo", "trainer.num_generations=2"),
}
SLOW = ("bnpo", "dapo", "gspo", "dr_grpo", "rloo")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SPLIT])
def test_any_split_into_micro_batches_makes_the_same_step(in_tmp: Path, name: str) -> None:
    """Completions end at unequal lengths, so that a mean of means would show."""
    Path("mine.py").write_text(SPREAD)
    words = (*SPLIT[name], "rewards=[mine.py:spread]", "trainer.max_completion_length=24", "trainer.temperature=1.5")
    whole = after(*words, "trainer.micro_batch=4")
    still = after(*words, "trainer.micro_batch=4", "trainer.learning_rate=1e-9")
    assert max(float((whole[key] - still[key]).abs().max()) for key in whole) > 1e-3
    for micro in (2, 1):
        split = after(*words, f"trainer.micro_batch={micro}")
        for key, value in split.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = ("trainer.num_generations=2", "trainer.temperature=0.7", "trainer.micro_batch=4", *STEP)
    trainer = held(tmp_path_factory.mktemp("grpo") / "run", "grpo", *words).trainer
    move(trainer.model)
    trainer.model.train()
    return trainer


def clipped_loss(kind: str, new: Any, old: Any, advantages: Any, mask: Any, sequence: bool, longest: int) -> Any:
    """The losses as their papers write them: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071."""
    log_ratio = new - old
    if sequence:  # the geometric mean of the tokens' ratios
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None].expand_as(new)
    ratio, a = log_ratio.exp(), advantages[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask
    if kind == "grpo":
        return (loss.sum(1) / mask.sum(1)).mean()
    return loss.sum() / (len(loss) * longest if kind == "dr_grpo" else mask.sum())


def test_a_step_whose_completions_are_all_left_out_is_worth_nothing(grpo, monkeypatch) -> None:
    """As TRL leaves out those that were cut off; their mean over no tokens is no number."""
    none = {"completion_mask": torch.zeros(4, 6, dtype=torch.long)}
    monkeypatch.setattr(grpo, "loss_type", "bnpo")
    monkeypatch.setattr(grpo, "_buffered_inputs", [none], raising=False)
    monkeypatch.setattr(grpo, "_step", 0)
    monkeypatch.setattr(grpo, "current_gradient_accumulation_steps", 1, raising=False)
    assert float(grpo._part_of_step(none)) == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo"]), st.booleans(), st.integers(0, 1 << 30), st.floats(0.01, 1.0)
)
def test_every_ratio_and_mask_is_honoured(grpo, kind: str, sequence: bool, seed: int, spread: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6) < torch.randint(1, 7, (4, 1), generator=drawn)).long()
    old = -torch.rand(4, 6, generator=drawn) * 5
    new = (old + spread * torch.randn(4, 6, generator=drawn)).requires_grad_()
    advantages = torch.randn(4, generator=drawn)
    grpo.loss_type, grpo.importance_sampling_level = kind, "sequence" if sequence else "token"
    grpo.current_gradient_accumulation_steps = 1
    # What stands in the padding must not matter.
    noisy = new + 3 * torch.randn(4, 6, generator=drawn) * (1 - mask)
    ids = torch.zeros(4, 6, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask}
    inputs |= {"advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": mask.sum()}
    grpo._get_per_token_logps_and_entropies = lambda *args, **kwargs: (noisy, torch.zeros(4, 6), None)
    try:
        found = grpo._compute_loss(grpo.model, inputs)
    finally:
        del grpo._get_per_token_logps_and_entropies
    expected = clipped_loss(kind, new, old, advantages, mask, sequence, grpo.max_completion_length)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    theirs, ours = (torch.autograd.grad(loss, new)[0] for loss in (found, expected))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert not theirs[mask == 0].any()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.2, 3.0), st.integers(0, 1 << 30))
def test_the_temperature_is_honoured(grpo, temperature: float, seed: int) -> None:
    """Log-probabilities are those of the distribution that was sampled from."""
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
    vars(base_of(grpo.model))["ftcore_lm_head"].temperature = temperature
    with torch.no_grad():
        found, entropy, _ = grpo._get_per_token_logps_and_entropies(
            grpo.model, ids, torch.ones_like(ids), 5, compute_entropy=True
        )
        logits = grpo.model(ids).logits[:, 3:-1] / temperature
    plain = logits.log_softmax(-1)
    torch.testing.assert_close(found, plain.gather(2, ids[:, 4:, None]).squeeze(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_sampler_gets_the_temperature_that_the_loss_has(grpo) -> None:
    asked: list[Any] = []
    generator = grpo._generator

    class Listening:
        def __getattr__(self, name: str) -> Any:
            return getattr(generator, name)

        def generate(self, prompt_ids: Any, sampling: Any) -> Any:
            asked.append(sampling)
            return generator.generate(prompt_ids, sampling)

    grpo._generator = Listening()
    grpo._generate_single_turn([[1, 2]], None, {}, 2)
    grpo._generator = generator
    (sampling,) = asked
    assert (sampling.temperature, sampling.max_new_tokens, sampling.top_p) == (0.7, 6, 1.0)


@pytest.mark.parametrize("name", ["grpo", pytest.param("rloo", marks=pytest.mark.slow), "ppo"])
def test_the_reference_is_the_start_or_the_base(in_tmp: Path, name: str) -> None:
    """A run on a trained adapter is at no distance from its start, and at some from its base."""
    loaded = runs.loaded([*TINY, "kernels=[]"])
    runs.shake(loaded.model, trainable_only=True)
    loaded.model.save_pretrained("adapter")
    words = [*TINY, f"+trainer={name}", *STEP, "trainer.max_steps=1", "adapter.path=adapter"]
    words += ["trainer.kl_coef=0.1"] if name == "ppo" else ["trainer.beta=0.1", "trainer.num_generations=2"]
    kl = {}
    for which in ("start", "base"):
        result = ftcore.run([*words, f"trainer.reference={which}", f"output_dir={which}"])
        lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        kl[which] = next(line["kl"] for line in lines if "kl" in line)
    assert kl["start"] == pytest.approx(0, abs=1e-6)
    assert abs(kl["base"]) > 1e-3


def test_online_dpo_s_log_probabilities(tmp_path: Path) -> None:
    """Those of TRL's own formula on the logits of all tokens; the loss begins at log 2."""
    trainer = held(tmp_path / "run", "online_dpo", "trainer.max_length=12", *STEP).trainer
    move(trainer.model)
    drawn = torch.Generator().manual_seed(1)
    prompt, completion = (torch.randint(0, 256, (3, n), generator=drawn) for n in (9, 5))
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    completion_mask = (torch.arange(5) < torch.tensor([[5], [2], [4]])).long()
    arguments = (trainer.model, prompt, mask, completion, completion_mask)
    with evaluating(trainer.model), torch.no_grad():
        ours = trainer._forward(*arguments)
        trl = next(cls for cls in type(trainer).__mro__ if cls.__name__ == "OnlineDPOTrainer")
        theirs = trl._forward(trainer, *arguments)
    assert trl.__module__.startswith("trl.")
    assert not ours[completion_mask == 0].any()
    torch.testing.assert_close(ours, theirs * completion_mask, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_online_dpo_steps_do_not_depend_on_the_split(in_tmp: Path) -> None:
    """Greedy enough that each prompt's completions are the same in any batch."""
    Path("mine.py").write_text(SPREAD)

    class Fixed:
        """Completions that depend on the prompt and on which of the two it is."""

        def generate(self, prompt_ids: Any, sampling: Any) -> ftcore.Completions:
            half = len(prompt_ids) // 2
            sums = [(sum(p), 31 * (n >= half)) for n, p in enumerate(prompt_ids)]
            ids = [[(total + other + k) % 256 for k in range(1 + total % 5)] for total, other in sums]
            return ftcore.Completions(ids=ids)

        def begin_rollout(self) -> None: ...
        def end_rollout(self) -> None: ...
        def weights_changed(self) -> None: ...

    @ftcore.hookimpl
    def ftcore_make_generator() -> Any:
        return Fixed()

    found = []
    for micro in (4, 2, 1):
        seen = Moved()
        words = [*TINY, *SGD, *STEP, "+trainer=online_dpo", "rewards=[mine.py:spread]", "trainer.max_steps=1"]
        words += ["trainer.max_grad_norm=0", f"trainer.micro_batch={micro}", "trainer.beta=0.5"]
        result = ftcore.run(words, plugins=[seen, ftcore_make_generator])
        named = seen.trainer.model.named_parameters()
        found.append(({n: p.detach() for n, p in named if p.requires_grad}, result.metrics["loss_first"]))
    for weights, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=2e-4)
        for name, p in weights.items():
            torch.testing.assert_close(p, found[0][0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def gkd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    words = ("trainer.global_batch=4", "trainer.micro_batch=4", "prompts=[]", "trainer.max_completion_length=6")
    trainer = held(tmp_path_factory.mktemp("gkd") / "run", "gkd", *words).trainer
    move(trainer.model)
    runs.shake(trainer.teacher_model)
    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_s_divergence_is_that_of_whole_logits(gkd, beta: float, monkeypatch) -> None:
    """Loss and gradients, in chunks of three tokens."""
    monkeypatch.setattr("ftcore_trainers._gkd_trainer.rows_of_logits", lambda vocabulary: 3)
    gkd.beta = beta
    rows = gkd.data_collator([gkd.train_dataset[place] for place in range(3)])
    inputs = {name: rows[name][:, :60] for name in ("input_ids", "attention_mask", "labels")}
    inputs["labels"][:, 30:35] = inputs["input_ids"][:, 30:35]
    gkd.model.train()
    ours = gkd.compute_loss(gkd.model, inputs)
    ours.backward()
    gradients = gradients_of(gkd.model)
    gkd.model.zero_grad()
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = [model(**given).logits[:, :-1] for model in (gkd.model, gkd.teacher_model)]
    theirs = gkd.generalized_jsd_loss(*logits, labels=inputs["labels"][:, 1:], beta=beta)
    theirs.backward()
    assert maths.apart(ours.detach(), theirs.detach()) <= 1e-5
    assert sum(float(g.norm()) for g in gradients.values()) > 1e-3
    whole = gradients_of(gkd.model)
    assert max(maths.apart(gradients[name], whole[name]) for name in gradients) <= 1e-5
    gkd.model.zero_grad()


def test_gkd_learns_from_its_own_completions(gkd) -> None:
    rows = gkd.data_collator([gkd.train_dataset[place] for place in range(2)])
    prompts = rows["prompt_ids"]
    assert all(ids == gkd.train_dataset[n]["input_ids"][: len(ids)] for n, ids in enumerate(prompts))
    made = gkd._own_completions(prompts)
    for row, prompt in enumerate(prompts):
        labels = made["labels"][row]
        assert made["input_ids"][row, : len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all()
        said = labels[labels != -100]
        assert 0 < len(said) <= 6
        assert torch.equal(said, made["input_ids"][row, len(prompt) : len(prompt) + len(said)])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("+trainer=gkd trainer.lmbda=1.5", "trainer.lmbda"),
        ("+trainer=gkd trainer.teacher=./nowhere", "trainer.teacher"),
        ("+trainer=gkd trainer.packing=true", "trainer.packing"),
        ("+trainer=online_dpo trainer.loss_type=hinge", "trainer.loss_type"),
        ("+trainer=online_dpo data.eval_size=2", "data.eval_size"),
        ("+trainer=online_dpo trainer.max_completion_length=2000", "trainer.max_length"),
        ("+trainer=rloo trainer.global_batch=6", "trainer.global_batch"),
        ("+trainer=rloo trainer.beta=-1", "trainer.beta"),
        ("+trainer=rloo +trainer.args.sync_ref_model=true", "trainer.args.sync_ref_model"),
        ("+trainer=grpo trainer.loss_type=dapoo", "trainer.loss_type"),
    ],
)
def test_what_the_plan_refuses(words: str, key: str) -> None:
    problems = runs.refusals([*runs.TINY, *words.split()])
    assert [problem.key for problem in problems] == [key]
    assert problems[0].fix


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "online_dpo"])
def test_prompts_that_cannot_be_completed_stop_before_weights_are_read(in_tmp: Path, name: str) -> None:
    class Unread:
        @ftcore.hookimpl
        def ftcore_load_model(self) -> Any:
            raise AssertionError("the weights were read")

    given = (
        *runs.TINY,
        f"+trainer={name}",
        "data.path=rows.jsonl",
        "rewards=[mine.py:spread]",
        "trainer.max_length=512",
    )
    Path("mine.py").write_text(SPREAD)

    def refused(row: dict[str, Any], *words: str) -> str:
        whole = row | {"prompt": row["prompt"][-1:]}
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, [whole, row])))
        with pytest.raises(ftcore.Refused) as found:
            ftcore.run([*given, *words], plugins=[Unread()])
        (problem,) = found.value.problems
        assert problem.key == "row 2 of the train split"
        return f"{problem.message}; {problem.fix}"

    long = refused({"prompt": "x" * 600}, "model.max_length=512", "trainer.max_completion_length=6")
    assert "more than the model's context of 512" in long
    assert "model.max_length=" in long
    Path("deaf.jinja").write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert "leaves out words of message 1 (system)" in refused({"prompt": told}, "data.template=deaf.jinja")


def test_prompts_that_fill_no_batch_are_no_run(in_tmp: Path) -> None:
    Path("mine.py").write_text(SPREAD)
    Path("rows.jsonl").write_text('{"prompt": "x"}')
    words = ["+trainer=grpo", "rewards=[mine.py:spread]", "data.path=rows.jsonl", "trainer.num_generations=2"]
    with pytest.raises(ftcore.Refused, match="do not fill one batch"):
        ftcore.run([*TINY, *STEP, *words, "trainer.max_steps=1", "output_dir=run"])
    assert not Path("run/trained").exists()


def test_a_teacher_of_another_vocabulary_is_refused(in_tmp: Path) -> None:
    Path("teacher").mkdir()
    Path("teacher/config.json").write_text('{"model_type": "llama", "vocab_size": 99}')
    (problem,) = runs.refusals([*TINY, "+trainer=gkd", "trainer.teacher=teacher"])
    assert (problem.key, "99 tokens" in problem.message) == ("trainer.teacher", True)


TASK = """
def a_lot(completions, completion_ids):
    \"\"\"The part of the tokens that are letters of the lower half of the alphabet's bytes.\"\"\"
    return [sum(96 <= token < 112 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo", "online_dpo"])
def test_a_task_that_can_be_learnt_is_learnt(in_tmp: Path, name: str) -> None:
    """From about 1 in 16 tokens on, by far more than 1,280 drawn tokens scatter; how far depends on what is drawn."""
    Path("mine.py").write_text(TASK)
    words = [*TINY, f"+trainer={name}", "rewards=[mine.py:a_lot]", "prompts=[]", "trainer.max_completion_length=8"]
    words += ["trainer.global_batch=32", "trainer.micro_batch=32", "trainer.schedule=constant", "adapter=full"]
    own = {
        "grpo": ["trainer.num_generations=8", "trainer.learning_rate=0.01", "trainer.max_steps=40"],
        "rloo": ["trainer.num_generations=8", "trainer.learning_rate=0.01", "trainer.max_steps=60"],
        "ppo": ["trainer.learning_rate=0.01", "trainer.max_steps=120", "trainer.num_ppo_epochs=2"],
        "online_dpo": ["trainer.learning_rate=0.01", "trainer.max_steps=40"],
    }
    result = ftcore.run([*words, *own[name]])
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line).get("reward") for line in lines]
    rewards = [reward for reward in rewards if reward is not None]
    first, last = (sum(part) / 5 for part in (rewards[:5], rewards[-5:]))
    assert first < 0.4
    wanted = 0.75 if name in ("grpo", "online_dpo") else first + 0.1
    assert last > wanted, (first, last)
