"""The trainers on preferences: their reference model, their memory, their metrics, and what their plans refuse."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from preference_runs import Held, gradients_of, held, move, rows_of
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

import ftcore
from ftcore.patching import BOUND
from ftcore.testing import maths, runs
from ftcore_trainers._fused_head import SETTINGS, base_of
from ftcore_trainers._reference import AdapterOff, Copied

TRAINERS = ("dpo", "kto", "orpo", "simpo", "reward")
LOG_2 = math.log(2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """Trainers by their words; each is made once, and its policy is moved off its start."""
    kept: dict[tuple[str, ...], Held] = {}

    def make(*words: str) -> Any:
        if words not in kept:
            kept[words] = held(tmp_path_factory.mktemp("run") / "run", *words)
            move(kept[words].trainer.model)
        trainer = kept[words].trainer
        trainer.model.train()
        trainer.model.zero_grad()
        return trainer

    return make


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_policy_that_is_its_reference_loses_log_2(tmp_path, adapter) -> None:
    trainer = held(tmp_path / "run", "dpo", f"adapter={adapter}").trainer
    loss = trainer.compute_loss(trainer.model, rows_of(trainer))
    assert loss.item() == pytest.approx(LOG_2, abs=1e-6)
    move(trainer.model)
    assert abs(trainer.compute_loss(trainer.model, rows_of(trainer)).item() - LOG_2) > 1e-3


# The head and the mask ------------------------------------------------------------------------------------------------


class Widest(TorchDispatchMode):
    """Most rows of any tensor whose last dimension is the vocabulary."""

    def __init__(self, vocabulary: int, weights: set[int]) -> None:
        super().__init__()
        self.vocabulary, self.weights, self.rows = vocabulary, weights, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            wide = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            if wide and tensor.numel() // self.vocabulary not in self.weights:  # the head's own matrix, transposed
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


@pytest.mark.few
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", TRAINERS[:4])
def test_logits_are_those_of_the_answers_only(made, name, mode) -> None:
    trainer = made(name)
    base = base_of(trainer.model)
    assert vars(base)["forward"] == vars(base)[BOUND]
    text = base.config.get_text_config()
    inputs = rows_of(trainer)
    getattr(trainer.model, mode)()
    with Widest(text.vocab_size, {text.hidden_size}) as seen:
        if mode == "train":
            trainer.compute_loss(trainer.model, inputs).backward()
        else:
            trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True)
    masks = [v for k, v in inputs.items() if k.endswith(("completion_mask", "_labels"))]
    answers = max(int((m > 0).sum()) for m in masks) if name == "kto" else sum(int((m > 0).sum()) for m in masks)
    tokens = sum(v.numel() for k, v in inputs.items() if k in ("input_ids", "chosen_input_ids", "rejected_input_ids"))
    prompts = int(inputs["chosen_attention_mask"].sum()) if name == "orpo" else 0
    assert 0 < seen.rows <= answers + prompts < tokens


@pytest.mark.parametrize("name", TRAINERS)
def test_pads_on_the_right_need_no_mask(made, name) -> None:
    trainer = made(name)
    assert trainer._masked is False
    losses = []
    for masked in (True, False):
        trainer._masked = masked
        if getattr(trainer, "ref_model", None) is not None:
            trainer.ref_model.masked = masked
        losses.append(trainer.compute_loss(trainer.model, rows_of(trainer)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_means_of_logits_are_those_of_trl_s_head(family) -> None:
    """With a cap on the logits (Gemma 2) and without one; at a temperature."""
    model = runs.loaded([f"+model={family}", "model.tiny=true", "model.dtype=float32", "kernels=[reference]"]).model
    runs.shake(model)
    base, batch = base_of(model), runs.batch_for(model)
    settings = vars(base)[SETTINGS]
    settings.mean_logits, settings.temperature = True, 0.7
    mine = model(**batch, fused_lm_head=True)
    add_fused_lm_head(base, temperature=0.7, outputs=("log_probs", "mean_logits"))
    theirs = model(**batch, fused_lm_head=True)
    assert maths.apart(mine.mean_logits.detach(), theirs.mean_logits.detach()) <= 1e-5
    assert maths.apart(mine.log_probs.detach(), theirs.log_probs.detach()) <= 1e-5
    assert theirs.mean_logits.abs().max() > 1e-2
    assert not mine.mean_logits.requires_grad


@pytest.mark.parametrize(
    "words", [("dpo", "kernels=[]"), ("orpo", "kernels=[]"), ("dpo", "+trainer.args.use_weighting=true")]
)
def test_where_the_head_does_not_serve_trl_s_does(made, words) -> None:
    trainer = made(*words)
    base = base_of(trainer.model)
    assert vars(base)["forward"] != vars(base).get(BOUND)
    plain = made(words[0]) if words[1] == "kernels=[]" else None
    loss = trainer.compute_loss(trainer.model, rows_of(trainer)).item()
    assert math.isfinite(loss)
    if plain is not None:
        assert loss == pytest.approx(plain.compute_loss(plain.model, rows_of(plain)).item(), abs=1e-5)


# Micro-batches --------------------------------------------------------------------------------------------------------


def step(trainer: Any, *places: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """What transformers' loop does up to the optimizer's step, on micro-batches of the rows in these places."""
    trainer.model.train()
    trainer.model.zero_grad()
    batches = [rows_of(trainer, *rows) for rows in places]
    given, number = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(given)
    loss = sum(trainer.training_step(trainer.model, batch, number).item() for batch in given)
    return loss, gradients_of(trainer.model)


@pytest.mark.parametrize("name", [*TRAINERS, "cpo"])
def test_micro_batches_make_the_same_step(made, name) -> None:
    words = ("simpo", "trainer.nll_weight=1") if name == "cpo" else (name,)
    trainer = made(*words)
    loss, gradients = step(trainer, (0, 1, 2, 3))
    assert sum(float(g.norm()) for g in gradients.values()) > 1e-3
    for split in (((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0,), (1,), (2,), (3,))):
        if len({len(rows) for rows in split}) > 1:
            continue  # a mean over rows of unequal micro-batches is no mean of their means
        other, others = step(trainer, *split)
        assert other == pytest.approx(loss, abs=1e-5)
        apart = {key: maths.apart(others[key], gradients[key]) for key in gradients}
        assert max(apart.values()) <= 1e-5, max(apart, key=apart.__getitem__)


def test_kto_pairs_a_step_s_rows_and_not_a_micro_batch_s(tmp_path) -> None:
    trainer = held(tmp_path / "run", "kto", "trainer.global_batch=4", "trainer.micro_batch=2").trainer
    said, mismatched = trainer.train_dataset["completion_ids"], trainer.train_dataset["KL_completion_ids"]
    for first in range(0, len(said), 4):
        group = list(said[first : first + 4])
        assert list(mismatched[first : first + 4]) == [group[-1], *group[:-1]]
    assert (
        trainer.train_dataset["label"]
        != held(tmp_path / "other", "kto", "trainer.seed=1").trainer.train_dataset["label"]
    )


# The reference model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    model = runs.loaded(["+model=qwen3", "model.tiny=true", "model.dtype=float32", "kernels=[]"]).model
    runs.shake(model, trainable_only=True)
    model.save_pretrained(folder)
    return str(folder)


def logps(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with torch.no_grad():
        answer = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
        )
    return answer.log_probs.sum(1)


@pytest.mark.parametrize("which", ["start", "base"])
def test_reference_of_a_continued_adapter(tmp_path, adapter, which) -> None:
    words = (f"adapter.path='{adapter}'", f"trainer.reference={which}")
    trainer = held(tmp_path / "run", "dpo", *words).trainer
    assert type(trainer.ref_model) is {"start": Copied, "base": AdapterOff}[which]
    trainer.model.eval()
    inputs = rows_of(trainer)
    started = logps(trainer.model, inputs)
    with trainer.model.disable_adapter():
        base = logps(trainer.model, inputs)
    assert (started - base).abs().max() > 1e-2
    expected = started if which == "start" else base
    torch.testing.assert_close(logps(trainer.ref_model, inputs), expected, rtol=1e-6, atol=1e-5)
    moved = move(trainer.model)
    torch.testing.assert_close(logps(trainer.ref_model, inputs), expected, rtol=1e-6, atol=1e-5)
    assert all(torch.equal(p, moved[n]) and p.requires_grad for n, p in trainer.model.named_parameters() if n in moved)
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.ref_model not in trainer.accelerator._models


def test_a_new_adapter_is_switched_off_and_one_that_took_weights_is_copied(tmp_path) -> None:
    assert type(held(tmp_path / "new", "kto").trainer.ref_model) is AdapterOff
    pissa = held(tmp_path / "pissa", "kto", "adapter.init=pissa").trainer
    assert type(pissa.ref_model) is Copied
    trainable = [name for name, p in pissa.model.named_parameters() if p.requires_grad]
    assert all(".default" in name for name in trainable)


@pytest.mark.parametrize(("name", "adapter_name"), [("dpo", "full"), ("kto", "lora")])
def test_log_probabilities_of_the_reference_computed_before(tmp_path, name, adapter_name) -> None:
    """The same loss and gradients, with nothing left to compute the reference with where all weights are trained."""
    answers = []
    for precompute in ("false", "true"):
        words = (f"adapter={adapter_name}", f"trainer.precompute_reference={precompute}", "trainer.global_batch=4")
        trainer = held(tmp_path / precompute, name, *words).trainer
        move(trainer.model)
        answers.append(step(trainer, (0, 1), (2, 3)))
    assert ("ref_logps" in trainer.train_dataset.column_names) == (name == "kto")
    assert (trainer.ref_model is None) == (adapter_name == "full")
    (loss, gradients), (other, others) = answers
    assert loss == pytest.approx(other, abs=1e-5)
    assert max(maths.apart(others[key], gradients[key]) for key in gradients) <= 1e-5


def test_a_trained_reference_is_told_from_another(tmp_path) -> None:
    """TRL keeps computed log-probabilities in a file by the weights: those that the reference answers with."""
    from trl.trainer.utils import hash_module

    off = held(tmp_path / "off", "dpo").trainer
    copied = held(tmp_path / "copied", "dpo", "adapter=full").trainer
    for trainer in (off, copied):
        before = hash_module(trainer.ref_model)
        move(trainer.model)
        assert hash_module(trainer.ref_model) == before
        assert hash_module(trainer.model) != before


# Rows and metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "metric"), [("dpo", "rewards/accuracies"), ("simpo", "rewards/accuracies"), ("reward", "accuracy")]
)
def test_metrics_are_logged_and_measured_on_held_out_rows(in_tmp, name, metric) -> None:
    words = ("trainer.max_steps=2", "trainer.global_batch=2", "trainer.eval_steps=1", "data.eval_size=2")
    result = ftcore.run(["+model=llama", "model.tiny=true", f"+trainer={name}", *words])
    lines = [
        json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sum(metric in line for line in lines) == 2
    assert sum(f"eval_{metric}" in line for line in lines) >= 3
    assert 0 <= result.metrics[f"eval_{metric}"] <= 1
    assert f"eval_{metric}_before" in result.metrics


LONG = {"prompt": "word " * 40, "chosen": "yes", "rejected": "no"}
SHORT = {"prompt": "x", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("name", ["dpo", "orpo", "reward"])
def test_rows_that_are_too_long_are_dropped_out_loud(in_tmp, capsys, name) -> None:
    (in_tmp / "rows.jsonl").write_text("\n".join(map(json.dumps, [SHORT, LONG, SHORT])), encoding="utf-8")
    words = ("trainer.max_length=100", "data.path=rows.jsonl")
    trainer = held(in_tmp / "run", name, *words).trainer
    assert len(trainer.train_dataset) == 2
    assert "1 of 3 train rows dropped: too long for trainer.max_length=100" in " ".join(capsys.readouterr().out.split())
    (in_tmp / "rows.jsonl").write_text(json.dumps(LONG), encoding="utf-8")
    with pytest.raises(ftcore.Refused, match=r"trainer\.max_length"):
        held(in_tmp / "none", name, *words)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_rows_that_the_chat_template_does_not_take_stop_before_weights_are_read(in_tmp, name) -> None:
    (in_tmp / "rows.jsonl").write_text("\n".join(map(json.dumps, [SHORT, SHORT | {"prompt": "no"}])), encoding="utf-8")
    (in_tmp / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never no') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
        encoding="utf-8",
    )

    class Unread:
        @ftcore.hookimpl
        def ftcore_load_model(self) -> Any:
            raise AssertionError("the weights were read")

    words = ("data=preference", "data.path=rows.jsonl", "data.template=strict.jinja")
    with pytest.raises(ftcore.Refused, match=r"row \d of the train split.*never no"):
        ftcore.run(["+model=llama", "model.tiny=true", f"+trainer={name}", *words], plugins=[Unread()])


THOUGHTLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As DeepSeek R1's template."""


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "reward"])
def test_answers_of_which_the_chat_template_leaves_words_out_are_refused(in_tmp, name) -> None:
    thought = SHORT | {"chosen": "<think>six and seven</think>13"}
    (in_tmp / "rows.jsonl").write_text("\n".join(map(json.dumps, [SHORT, thought])), encoding="utf-8")
    (in_tmp / "thoughtless.jinja").write_text(THOUGHTLESS, encoding="utf-8")
    words = ("data=preference", "data.path=rows.jsonl", "data.template=thoughtless.jinja")
    with pytest.raises(ftcore.Refused, match=r"row \d of the train split.*leaves out the words of turn 2"):
        held(in_tmp / "run", name, *words)
    (in_tmp / "rows.jsonl").write_text(json.dumps(SHORT), encoding="utf-8")
    assert held(in_tmp / "plain", name, *words).rows


class Begun(Held):
    """With a tokenizer that has a begin token."""

    @ftcore.hookimpl(wrapper=True)
    def ftcore_load_tokenizer(self):
        tokenizer = yield
        tokenizer.bos_token = tokenizer.pad_token
        return tokenizer


@pytest.mark.parametrize("name", ["orpo", "simpo"])
@pytest.mark.parametrize("prompt", [{"prompt": "x"}, {}], ids=["conversations", "texts"])
def test_a_begin_token_is_no_other_than_dpo_s(in_tmp, name, prompt) -> None:
    row = prompt | {"chosen": "q: x a: yes", "rejected": "q: x a: no"}
    (in_tmp / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    words = ("data=preference", "data.path=rows.jsonl")
    ours = held(in_tmp / "ours", name, *words, found=Begun()).trainer.train_dataset[0]
    dpo = held(in_tmp / "dpo", "dpo", *words, found=Begun()).trainer.train_dataset[0]
    for side in ("chosen", "rejected"):
        wanted = dpo["prompt_ids"] + dpo[f"{side}_ids"]
        found = ours[f"{side}_input_ids"]
        assert found[: len(wanted)] == wanted
        assert len(found) - len(wanted) <= 1  # TRL closes these rows by an end token


def test_pairs_are_rows_of_kto_as_well(tmp_path) -> None:
    found = held(tmp_path / "run", "kto", "data=preference")
    assert len(found.trainer.train_dataset) == 2 * len(found.rows)
    assert sum(found.trainer.train_dataset["label"]) == len(found.rows)


def test_pairs_that_keep_their_order_give_kto_batches_of_both_answers(tmp_path) -> None:
    words = ("data=preference", "trainer.micro_batch=4", "trainer.global_batch=4")
    found = held(tmp_path / "held out", "kto", *words, "data.eval_size=4").trainer
    labels = list(found.eval_dataset["label"])
    assert len(labels) == 8
    assert all(set(labels[at : at + 4]) == {True, False} for at in (0, 4))
    streamed = held(tmp_path / "streamed", "kto", *words, "data.streaming=true", "trainer.max_steps=1").trainer
    labels = [row["label"] for row in itertools.islice(streamed.train_dataset, 16)]
    assert len(labels) == 16
    assert all(set(labels[at : at + 4]) == {True, False} for at in range(0, 16, 4))


def test_a_router_s_loss_keeps_its_mask_and_trl_s_head(tmp_path) -> None:
    trainer = held(tmp_path / "run", "dpo", model="qwen3_moe").trainer
    assert trainer.aux_loss_enabled
    assert trainer._masked
    loss = trainer.compute_loss(trainer.model, rows_of(trainer))
    assert loss.item() > LOG_2  # the router's loss is on top


def test_sixteen_bits(in_tmp) -> None:
    words = ("model.dtype=bfloat16", "trainer.max_steps=1", "trainer.global_batch=2")
    for name in ("dpo", "orpo"):
        result = ftcore.run(["+model=llama", "model.tiny=true", f"+trainer={name}", *words])
        assert result.metrics["loss_first"] == pytest.approx(LOG_2, abs=2e-3) or name == "orpo"


# Plans ----------------------------------------------------------------------------------------------------------------

BAD = [
    (
        "dpo",
        "trainer.packing=true adapter.dropout=0.1 trainer.beta=0 trainer.label_smoothing=0.1 "
        "trainer.loss_weights=[1,2] +trainer.args.padding_free=true +trainer.args.sync_ref_model=true "
        "+trainer.args.gradient_checkpointing=true",
        "trainer.packing adapter.dropout trainer.beta trainer.label_smoothing trainer.loss_weights "
        "trainer.args.padding_free trainer.args.sync_ref_model trainer.args.gradient_checkpointing",
    ),
    ("dpo", "trainer.loss_type=sigmiod", "trainer.loss_type"),
    ("dpo", "trainer.loss_type=[sigmoid,5]", "trainer.loss_type"),
    ("dpo", "trainer.loss_type=[]", "trainer.loss_type"),
    ("dpo", "trainer.loss_type=exo_pair", "trainer.label_smoothing"),
    (
        "dpo",
        "trainer.loss_type=nca_pair +trainer.args.f_divergence_type=forward_kl trainer.label_smoothing=0.5",
        "trainer.args.f_divergence_type trainer.label_smoothing",
    ),
    (
        "dpo",
        "trainer.reference=base adapter.init=pissa trainer.precompute_reference=true data.streaming=true "
        "trainer.max_steps=1",
        "trainer.reference trainer.precompute_reference",
    ),
    (
        "kto",
        "trainer.packing=true adapter.dropout=0.1 trainer.beta=0 trainer.loss_type=dpo "
        "trainer.undesirable_weight=-1 +trainer.args.train_sampling_strategy=random",
        "trainer.packing adapter.dropout trainer.beta trainer.loss_type trainer.undesirable_weight "
        "trainer.args.train_sampling_strategy",
    ),
    ("kto", "trainer.micro_batch=1 trainer.reference=base adapter.init=olora", "trainer.micro_batch trainer.reference"),
    ("kto", "trainer.global_batch=1", "trainer.global_batch"),
    (
        "orpo",
        "trainer.packing=true adapter.dropout=0.1 trainer.beta=0 data.streaming=true trainer.max_steps=1",
        "trainer.packing adapter.dropout trainer.beta data.streaming",
    ),
    (
        "simpo",
        "trainer.packing=true adapter.dropout=0.1 trainer.beta=0 data.streaming=true trainer.max_steps=1 "
        "trainer.loss_type=cpo trainer.gamma=-1 trainer.label_smoothing=-1",
        "trainer.packing adapter.dropout trainer.beta data.streaming trainer.loss_type trainer.gamma "
        "trainer.label_smoothing",
    ),
    (
        "simpo",
        "trainer.label_smoothing=0.1 trainer.loss_type=ipo trainer.gamma=2",
        "trainer.label_smoothing trainer.gamma",
    ),
    (
        "reward",
        "trainer.packing=true adapter.dropout=0.1 trainer.center_rewards=-1 prompts=[hello]",
        "trainer.packing adapter.dropout trainer.center_rewards prompts",
    ),
]
"""Trainer, words, and the keys that are refused, each once."""


@pytest.mark.parametrize(("name", "words", "keys"), BAD)
def test_what_a_plan_refuses(name, words, keys) -> None:
    found = runs.refusals(["+model=qwen3", "model.tiny=true", f"+trainer={name}", *words.split()])
    assert sorted(problem.key for problem in found) == sorted(keys.split())
    assert all(problem.fix for problem in found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpo", "trainer.loss_type=[sigmoid,sft] trainer.loss_weights=[1,0.2]"),
        ("dpo", "trainer.loss_type=exo_pair trainer.label_smoothing=1e-3"),
        ("dpo", "adapter.init=pissa"),
        ("dpo", "adapter.dropout=0.1 +trainer.args.disable_dropout=false"),
        ("dpo", "data.streaming=true trainer.max_steps=1"),
        ("kto", "trainer.micro_batch=1 trainer.loss_type=apo_zero_unpaired"),
        ("kto", "data=preference"),
    ],
)
def test_what_a_plan_takes(name, words) -> None:
    assert runs.refusals(["+model=qwen3", "model.tiny=true", f"+trainer={name}", *words.split()]) == ()


def test_every_loss_of_trl_s_is_known_and_runs(made) -> None:
    from ftcore_trainers.dpo import LOSS_TYPES

    trainer = made("dpo")
    other = copy.copy(trainer)
    other.label_smoothing = 0.1
    losses, inputs = {}, rows_of(other, 0, 1)
    for loss in LOSS_TYPES:
        other.loss_types, other.loss_weights = [loss], [1.0]
        losses[loss] = other.compute_loss(other.model, inputs).item()
    assert all(map(math.isfinite, losses.values()))
    assert len({round(value, 6) for value in losses.values()}) == len(LOSS_TYPES)
    other.loss_types = ["sigmiod"]
    with pytest.raises(ValueError, match="Unknown loss type") as raised:
        other.compute_loss(other.model, inputs)
    assert all(f"'{name}'" in str(raised.value) for name in LOSS_TYPES)
    assert str(raised.value).count("'") == 2 * len(LOSS_TYPES)
