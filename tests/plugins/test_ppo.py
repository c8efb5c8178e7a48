"""PPO: its formulas against numbers worked out by hand, its batches, and what it keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_runs import held, move

import ftcore
from ftcore.answers import evaluating
from ftcore.testing import runs
from ftcore_trainers import _ppo_math as ppo

MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
SCORES = torch.tensor([2.0, -1.0])
LOGPROBS = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, -9.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, -0.5], [-0.5, -2.0, -1.0]])
VALUES = torch.tensor([[1.0, 0.5, -1.0], [0.2, 0.4, 7.0]])
# -0.1 (log p - log p_ref), and the score on the last token: -0.1 * 0.5 = -0.05, 0, 2 - 0.1 * -0.5 = 2.05;
# -0.1 * -0.5 = 0.05, -1 - 0.1 * 1 = -1.1.
REWARDS = torch.tensor([[-0.05, 0.0, 2.05], [0.05, -1.1, 0.0]])
# With gamma = lam = 1/2, from the last token back:
#   row 0: delta_2 = 2.05 + 1 = 3.05; delta_1 = 0 - 0.5 - 0.5 = -1; delta_0 = -0.05 + 0.25 - 1 = -0.8
#          A_2 = 3.05; A_1 = -1 + 3.05 / 4 = -0.2375; A_0 = -0.8 - 0.2375 / 4 = -0.859375
#   row 1: delta_1 = -1.1 - 0.4 = -1.5; delta_0 = 0.05 + 0.2 - 0.2 = 0.05
#          A_1 = -1.5; A_0 = 0.05 - 1.5 / 4 = -0.325
ADVANTAGES = torch.tensor([[-0.859375, -0.2375, 3.05], [-0.325, -1.5, 0.0]])
RETURNS = torch.tensor([[0.140625, 0.2625, 2.05], [-0.125, -1.1, 0.0]])  # A + V
RATIOS = torch.tensor([[1.5, 0.5, 1.1], [0.7, 1.3, 3.0]])
# max(-A r, -A clip(r, 0.8, 1.2)):
#   0.859375 * 1.5 = 1.2890625 (> 1.03125); 0.2375 * 0.8 = 0.19 (clipped; > 0.11875); -3.05 * 1.1 = -3.355;
#   0.325 * 0.8 = 0.26 (clipped; > 0.2275); 1.5 * 1.3 = 1.95 (> 1.8)
POLICY_SUM, POLICY_CLIPPED = 1.2890625 + 0.19 - 3.355 + 0.26 + 1.95, 2
NEW_VALUES = torch.tensor([[1.1, 1.0, -1.5], [0.2, -0.6, 0.0]])
# max((V - R)^2, (V_clipped - R)^2), with V_clipped within 0.2 of the old value:
#   0.959375^2 = 0.920400390625; 0.7375^2 = 0.54390625 (V_clipped = 0.7: 0.19140625);
#   3.55^2 = 12.6025 (V_clipped = -1.2: 10.5625); 0.325^2 = 0.105625; V_clipped = 0.2: 1.3^2 = 1.69 (clipped; > 0.25)
VALUE_SUM, VALUE_CLIPPED = (0.920400390625 + 0.54390625 + 12.6025 + 0.105625 + 1.69) / 2, 1
LOSS = (0.3340625 + 0.1 * 7.9312158203125) / 5
"""Both sums, the second by `vf_coef`, over the five tokens."""

STEP = (
    "trainer.max_completion_length=6",
    "trainer.global_batch=4",
    "sampling.max_new_tokens=2",
    "prompts=[]",
)


def test_rewards_of_tokens() -> None:
    torch.testing.assert_close(ppo.token_rewards(SCORES, LOGPROBS, REFERENCE, MASK, 0.1), REWARDS)


def test_advantages() -> None:
    found = ppo.advantages_of(REWARDS, VALUES, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(found, ADVANTAGES)
    torch.testing.assert_close((found + VALUES) * MASK, RETURNS)


def test_policy_loss() -> None:
    found = ppo.policy_loss(LOGPROBS + RATIOS.log(), LOGPROBS, ADVANTAGES, MASK, 0.2)
    assert found.loss.item() == pytest.approx(POLICY_SUM, rel=1e-6)
    assert found.clipped.item() == POLICY_CLIPPED


def test_value_loss() -> None:
    found = ppo.value_loss(NEW_VALUES, VALUES, RETURNS, MASK, 0.2)
    assert found.loss.item() == pytest.approx(VALUE_SUM, rel=1e-6)
    assert found.clipped.item() == VALUE_CLIPPED


def test_whitening() -> None:
    # Of 1, 2, 3 and 6 the mean is 3 and the variance (4 + 1 + 0 + 9) / 4 = 3.5.
    x, mask = torch.tensor([[1.0, 2.0, 50.0], [3.0, 6.0, -50.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    white = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 3.0, 0.0]]) / math.sqrt(3.5)
    torch.testing.assert_close(ppo.whiten(x, mask), white)
    torch.testing.assert_close(ppo.whiten(x, mask, shift=False), white + 3 * mask)


def test_explained_variance() -> None:
    # Returns 0 and 2 have a variance of 1, the errors 1 and 0 one of 1/4.
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    values, returns = torch.tensor([[-1.0, 2.0, 9.0]]), torch.tensor([[0.0, 2.0, 5.0]])
    assert ppo.explained_variance(values, returns, mask).item() == pytest.approx(0.75)
    assert ppo.explained_variance(values, 0 * returns, mask).isnan()


def test_kl_coefficient_follows_its_target() -> None:
    # 50 % above the target counts as 20 %: 0.1 * (1 + 0.2 * 100 / 1000) = 0.102; 10 % below: 0.102 * (1 - 0.01).
    kl = ppo.KLCoefficient(0.1, target=6.0, horizon=1000)
    kl.follow(9.0, 100)
    assert kl.value == pytest.approx(0.102)
    kl.follow(5.4, 100)
    assert kl.value == pytest.approx(0.102 * 0.99)
    fixed = ppo.KLCoefficient(0.1)
    fixed.follow(9.0, 100)
    assert fixed.value == 0.1


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(shapes, st.randoms(use_true_random=False), st.floats(0, 1), st.floats(0, 1))
def test_padding_changes_nothing(shape, random, gamma, lam) -> None:
    rows, width = shape
    lengths = torch.tensor([random.randint(1, width) for _ in range(rows)])
    mask = (torch.arange(width) < lengths[:, None]).float()
    drawn = torch.Generator().manual_seed(random.randint(0, 1 << 30))
    a, b, c, d = torch.randn(4, rows, width, generator=drawn, dtype=torch.float64)
    scores = torch.randn(rows, generator=drawn, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=drawn, dtype=torch.float64) * 9 * (1 - mask)

    def all_of(x: Any) -> list[torch.Tensor]:
        rewards = ppo.token_rewards(scores, a + x, b - x, mask, 0.3)
        advantages = ppo.advantages_of(rewards, c + x, mask, gamma, lam)
        policy = ppo.policy_loss(a + x, d - x, advantages, mask, 0.2)
        value = ppo.value_loss(c + x, d - x, rewards - x, mask, 0.2)
        return [rewards, advantages, ppo.whiten(a + x, mask), policy.loss, policy.clipped, value.loss, value.clipped]

    for plain, noisy in zip(all_of(0), all_of(noise), strict=True):
        torch.testing.assert_close(noisy, plain)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 20), st.floats(-3, 3).map(lambda x: round(x, 6)), st.floats(0.01, 0.9))
def test_a_ratio_past_the_clip_has_no_gradient(ratio, advantage, clip) -> None:
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = ppo.policy_loss(new, 0 * one, advantage * one, one, clip)
    found.loss.backward()
    past = (advantage > 0 and ratio > 1 + clip) or (advantage < 0 and ratio < 1 - clip)
    assert new.grad.item() == pytest.approx(0.0 if past else -advantage * ratio, abs=1e-9)
    assert found.clipped.item() == float(past)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PPO at a temperature, on weights off their start."""
    words = ("trainer.temperature=0.7", "trainer.micro_batch=2", *STEP)
    made = held(tmp_path_factory.mktemp("ppo") / "run", "ppo", *words).trainer
    move(made.model)
    torch.nn.init.normal_(made.value_head.weight, std=0.1)
    return made


def test_loss_of_a_step_by_hand(trainer, monkeypatch) -> None:
    """The numbers from above through the trainer, as the only micro-batch of a step."""
    batch = {"old_logprobs": LOGPROBS, "old_values": VALUES, "advantages": ADVANTAGES, "returns": RETURNS}
    batch |= {"mask": MASK, "tokens": MASK.sum()}
    seen = (LOGPROBS + RATIOS.log(), NEW_VALUES, torch.zeros(2, 3))
    monkeypatch.setattr(trainer, "_look_at", lambda model, inputs: seen)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(LOSS, rel=1e-6)
    trainer._metrics["train"].clear()


def test_logprobs_and_values_are_those_of_each_row_alone(trainer) -> None:
    """Of every token of a completion, at the temperature, whatever the row is padded with."""
    prompts, completions = [[5, 6, 7], [8] * 9, [70]], [[9, 10], [11], [12, 13, 14, 15]]
    batch = trainer._padded(prompts, completions)
    with evaluating(trainer.model), torch.no_grad():
        logprobs, values, entropy = trainer._look_at(trainer.model, batch)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            out = trainer.model(torch.tensor([prompt + completion]), output_hidden_states=True)
            places = slice(len(prompt) - 1, -1)
            plain = (out.logits[0, places] / 0.7).log_softmax(-1)
            count = len(completion)
            torch.testing.assert_close(logprobs[row, :count], plain[range(count), completion], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropy[row, :count], -(plain.exp() * plain).sum(-1), atol=1e-5, rtol=1e-5)
            states = out.hidden_states[-1][0, places]
            torch.testing.assert_close(
                values[row, :count], trainer.value_head(states).squeeze(-1), atol=1e-5, rtol=1e-5
            )
            assert not any(tensor[row, count:].any() for tensor in (logprobs, values, entropy))


def test_a_batch_of_few_rows_weighs_less_in_what_is_measured(trainer, monkeypatch) -> None:
    """As the last one of the held-out prompts has."""
    monkeypatch.setattr(trainer, "_rewards", [lambda prompts, **_: [float(len(prompts) == 1)] * len(prompts)])
    trainer.model.eval()
    trainer._metrics["eval"].clear()
    for number in (8, 1):
        trainer._scores([{"prompt": "Hi"}] * number, [[5, 6]] * number)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["eval_reward"] == pytest.approx(1 / 9)
    trainer._metrics["eval"].clear()


def test_a_rollout_is_on_policy_and_starts_at_the_reference(tmp_path: Path) -> None:
    made = held(tmp_path / "run", "ppo", "trainer.micro_batch=4", *STEP).trainer
    made.model.train()
    torch.manual_seed(0)
    batch = made.roll_out([made.train_dataset[place] for place in range(4)])
    logged = made._metrics["train"]
    assert logged["kl"] == [(0.0, 4)]
    assert batch["old_logprobs"].abs().sum() > 1
    assert not batch["old_values"].any()  # the value head begins with 0
    made.current_gradient_accumulation_steps = 1
    made.compute_loss(made.model, batch | {"tokens": batch["mask"].sum()})
    assert logged["clip_ratio"][-1][0] == 0
    assert logged["approx_kl"][-1][0] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_any_split_into_micro_batches_makes_the_same_steps(in_tmp: Path) -> None:
    """Two steps of SGD on one rollout: adapter and value head move alike."""

    class Seen:
        @ftcore.hookimpl(wrapper=True)
        def ftcore_train(self, trainer: Any):
            self.trainer = trainer
            move(trainer.model)
            return (yield)

    words = ("trainer.optimizer=sgd", "trainer.learning_rate=0.3", "trainer.schedule=constant", "trainer.warmup=0")
    words = (*words, "trainer.num_mini_batches=2", "trainer.num_ppo_epochs=1", "trainer.max_steps=2", *STEP)
    words = (
        "+model=qwen3",
        "model.tiny=true",
        "model.dtype=float32",
        "+trainer=ppo",
        "trainer.max_grad_norm=0",
        *words,
    )
    after = []
    for micro in (4, 2, 1):
        seen = Seen()
        ftcore.run([*words, f"trainer.micro_batch={micro}"], plugins=[seen])
        named = [*seen.trainer.model.named_parameters(), *seen.trainer.value_head.named_parameters()]
        after.append({name: p.detach() for name, p in named if p.requires_grad})
    assert after[0]["weight"].abs().max() > 1e-5
    for other in after[1:]:
        for name, p in other.items():
            torch.testing.assert_close(p, after[0][name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_goes_on_with_its_value_head_and_its_kl_coefficient(in_tmp: Path) -> None:
    words = [
        "+model=qwen3",
        "model.tiny=true",
        "+trainer=ppo",
        "trainer.save_steps=2",
        "trainer.num_ppo_epochs=2",
        *STEP,
    ]
    words += ["trainer.kl_target=1.0", "trainer.kl_horizon=10", "output_dir=run"]
    found: list[Any] = []

    class Seen:
        @ftcore.hookimpl(wrapper=True)
        def ftcore_train(self, trainer: Any):
            found.append(trainer)
            return (yield)

    ftcore.run([*words, "trainer.max_steps=2"], plugins=[Seen()])
    ftcore.run([*words, "trainer.max_steps=4", "resume=last"], plugins=[Seen()])
    first, second = found
    assert second.state.global_step == 4
    lines = [json.loads(line) for line in (in_tmp / "run" / "metrics.jsonl").read_text().splitlines()]
    rolled = [line for line in lines if "kl_coef" in line]
    assert [line["step"] for line in rolled] == [1, 3]
    assert rolled[0]["kl_coef"] == 0.05
    assert rolled[1]["kl_coef"] == first._kl.value < 0.05
    # Values are those of the head that two steps have trained.
    assert rolled[0]["values"] == 0
    assert rolled[1]["values"] != 0
    assert not torch.equal(first.value_head.weight, second.value_head.weight)


def test_prompts_fill_every_rollout() -> None:
    from ftcore_trainers._ppo_trainer import PromptSampler

    sampler = PromptSampler(rows=5, rollout=4, uses=3, seed=0, epoch=lambda: 0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 2 * 4 * 3
    rollouts = [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
    assert rollouts[0] == rollouts[1] == rollouts[2] != rollouts[3] == rollouts[5]
    assert set(rollouts[0] + rollouts[3]) == set(range(5))
    assert list(PromptSampler(5, 4, 3, 0, lambda: 1)) != drawn


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("trainer.gamma=1.5", "trainer.gamma"),
        ("trainer.lam=-1", "trainer.lam"),
        ("trainer.num_ppo_epochs=0", "trainer.num_ppo_epochs"),
        ("trainer.kl_target=0", "trainer.kl_target"),
        ("trainer.kl_target=6 trainer.kl_coef=0", "trainer.kl_target"),
        ("trainer.temperature=0", "trainer.temperature"),
        ("trainer.top_p=0", "trainer.top_p"),
        ("trainer.packing=true", "trainer.packing"),
        ("adapter.dropout=0.1", "adapter.dropout"),
        ("data.streaming=true trainer.max_steps=2", "data.streaming"),
        ("adapter.init=pissa trainer.reference=base", "trainer.reference"),
        ("+trainer.args.remove_unused_columns=true", "trainer.args.remove_unused_columns"),
    ],
)
def test_what_the_plan_refuses(words: str, key: str) -> None:
    problems = runs.refusals([*runs.TINY, "+trainer=ppo", *words.split()])
    assert [problem.key for problem in problems] == [key]
    assert problems[0].fix
