"""The trainers with the model's own fused head, against TRL's trainers with theirs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

import ftcore
from ftcore.patching import BOUND
from ftcore.testing import maths, runs
from ftcore_trainers._collator import COUNTS, WithoutMask, causal
from ftcore_trainers._fused_head import base_of
from ftcore_trainers._token_sums import TokenSums

CPU = not torch.cuda.is_available()
CLOSE = 1e-5 if CPU else 1e-4
"""A GPU adds up gradients of embeddings in any order, and the rest of shapes in others."""
SFT = ("+model=qwen3", "model.tiny=true", "model.dtype=float32", "+trainer=sft", "trainer.max_length=160")
GRPO = ("+model=llama", "model.tiny=true", "model.dtype=float32", "+trainer=grpo", "trainer.max_completion_length=8")
STEPS = ("trainer.max_steps=2", "trainer.global_batch=4", "sampling.max_new_tokens=2", "prompts=[]")


class Seen:
    """A plugin that looks at the trainer before it trains, and keeps it."""

    def __init__(self, look: Callable[[Any], Any] = lambda trainer: None) -> None:
        self.look = look

    @ftcore.hookimpl(wrapper=True)
    def ftcore_train(self, trainer: Any):
        self.trainer = trainer
        self.ours = vars(base_of(trainer.model))["forward"] == vars(base_of(trainer.model)).get(BOUND)
        self.answer = self.look(trainer)
        return (yield)


@pytest.fixture
def watched(in_tmp: Path) -> Callable[..., Seen]:
    def run(*words: str, look: Callable[[Any], Any] = lambda trainer: None) -> Seen:
        seen = Seen(look)
        seen.result = ftcore.run([*words, *STEPS], plugins=[seen])
        return seen

    return run


def logged(seen: Seen) -> list[dict[str, float]]:
    lines = (seen.result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_sft_logs_what_trl_logs(watched, adapter) -> None:
    words = (*SFT, f"adapter={adapter}", "trainer.micro_batch=4", "trainer.eval_steps=1")
    ours, theirs = watched(*words, "kernels=[reference]"), watched(*words, "kernels=[]")
    assert (ours.ours, theirs.ours) == (True, False)
    assert type(ours.trainer.data_collator) is WithoutMask
    assert type(theirs.trainer.data_collator) is DataCollatorForLanguageModeling
    timed = ("runtime", "per_second", "time")
    ours_lines, their_lines = logged(ours), logged(theirs)
    assert len(ours_lines) == len(their_lines) >= 5
    for mine, other in zip(ours_lines, their_lines, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            # Over several batches, our mean is one over tokens.
            several = name in ("eval_entropy", "eval_mean_token_accuracy")
            if not any(word in name for word in timed):
                # Launches of filled-up batches are recorded on a GPU: their pads count as work done.
                close = 2e-2 if several else 1e-4 if CPU else 0.3 if name == "total_flos" else 1e-3
                assert mine[name] == pytest.approx(other[name], rel=close), name
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(ours_lines[1])
    after = dict(theirs.trainer.model.named_parameters())
    for name, p in ours.trainer.model.named_parameters():
        torch.testing.assert_close(p, after[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.args={loss_type: dft}",),
        pytest.param(("trainer.args={label_smoothing_factor: 0.1}",), marks=pytest.mark.slow),
    ],
)
def test_other_losses_are_trl_s(watched, words) -> None:
    words = (*SFT, *words)
    ours, theirs = watched(*words, "kernels=[reference]"), watched(*words, "kernels=[]")
    assert ours.ours  # also for TRL's own loss, the log-probabilities come from the model's head
    assert type(ours.trainer.data_collator) is DataCollatorForLanguageModeling
    assert ours.result.metrics["loss_last"] == pytest.approx(theirs.result.metrics["loss_last"], rel=1e-4)


def test_packed_rows(watched) -> None:
    words = (*SFT, "trainer.packing=true", "trainer.micro_batch=4")
    ours, theirs = watched(*words, "kernels=[reference]"), watched(*words, "kernels=[]")
    assert ours.trainer.padding_free
    for mine, other in zip(logged(ours), logged(theirs), strict=True):
        for name in {"loss", "num_tokens", "entropy", "eval_loss"} & mine.keys():
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.slow
def test_micro_batches_make_the_same_step(watched) -> None:
    """One step of SGD on rows with different numbers of supervised tokens moves the weights by the gradient."""
    words = (
        "trainer.optimizer=sgd",
        "trainer.learning_rate=1.0",
        "trainer.max_grad_norm=0",
        "trainer.schedule=constant",
    )
    words = (*SFT, "adapter=full", "kernels=[reference]", *words, "trainer.warmup=0")
    steps = []
    for micro in (4, 2, 1):
        seen = watched(*words, f"trainer.micro_batch={micro}", look=lambda t: copy.deepcopy(t.model.state_dict()))
        assert any((p - seen.answer[n]).abs().max() > 1e-2 for n, p in seen.trainer.model.state_dict().items())
        steps.append((seen.result.metrics["loss_first"], dict(seen.trainer.model.named_parameters())))
    for loss, after in steps[1:]:
        assert loss == pytest.approx(steps[0][0], abs=1e-5)
        for name, p in after.items():
            torch.testing.assert_close(
                p, steps[0][1][name], rtol=CLOSE, atol=CLOSE, msg=lambda text, n=name: f"{n}: {text}"
            )


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_and_metrics_wait_for_the_log(watched) -> None:
    def look(trainer: Any) -> tuple[list[str], ...]:
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert set(inputs) == {"input_ids", "labels", "num_tokens", "supervised"}
        trainer.model.train()
        with Waits() as step:
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(9))
        del inputs["supervised"]
        with Waits() as without:
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(9))
        trainer._sums["train"] = TokenSums()
        return step.seen, without.seen

    seen = watched(*SFT, "kernels=[reference]", look=look)
    assert seen.answer == ([], ["nonzero"]), "what is not given is looked for"


def test_asking_for_the_outputs_gives_the_logits(watched) -> None:
    def look(trainer: Any) -> Any:
        inputs = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
        trainer.model.eval()
        loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        with torch.no_grad():
            plain = trainer.model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        torch.testing.assert_close(loss, plain.loss)
        torch.testing.assert_close(outputs.logits, plain.logits)
        trainer._sums["eval"] = TokenSums()
        return True

    assert watched(*SFT, "kernels=[reference]", look=look).answer


@pytest.mark.parametrize("kernel_set", ["kernels=[]", "kernels=[reference]"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_right_padding_needs_no_mask(family, kernel_set) -> None:
    """Loss and every gradient of a batch of unequal rows, with the mask and without it."""
    model = runs.loaded([f"+model={family}", "model.tiny=true", "model.dtype=float32", kernel_set]).model
    runs.shake(model)
    drawn = torch.Generator().manual_seed(7)
    rows = [{"input_ids": torch.randint(0, 256, (n,), generator=drawn).tolist()} for n in (5, 11, 3, 8)]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]
    collate = DataCollatorForLanguageModeling(pad_token_id=256)
    masked, bare = collate(rows), WithoutMask(collate)(rows)
    assert bare["num_tokens"] == masked["attention_mask"].sum() == 27
    after = masked["labels"].flatten().tolist()[1:]  # no row begins with a label
    assert bare["supervised"].tolist() == [place for place, label in enumerate(after) if label != -100]
    bare = {name: value for name, value in bare.items() if name not in COUNTS}
    assert "attention_mask" not in bare
    loss, gradients = maths.loss_and_gradients(model, masked)
    gradients = {name: g.clone() for name, g in gradients.items()}
    bare_loss, bare_gradients = maths.loss_and_gradients(model, bare)
    assert maths.apart(bare_loss, loss) <= 1e-5
    assert max(maths.apart(bare_gradients[name], gradients[name]) for name in gradients) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("packing", ["false", "true"])
def test_steps_between_two_lines_of_the_log_wait_for_nothing(in_tmp, packing) -> None:
    from transformers import TrainerCallback

    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **more) -> None:
            if state.global_step == 6:  # every kernel is compiled, every launch recorded
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **more) -> None:
            if state.global_step == 12:
                torch.cuda.set_sync_debug_mode("default")

    words = [*SFT, "trainer.max_steps=14", "trainer.logging_steps=100", "trainer.global_batch=4", "prompts=[]"]
    words = [*words, f"trainer.packing={packing}"]
    try:
        ftcore.run([*words, "model.dtype=bfloat16"], plugins=[Seen(lambda trainer: trainer.add_callback(Strict()))])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_mask_that_says_more_stays() -> None:
    config = runs.loaded(["+model=llama", "model.tiny=true"]).model.config
    assert causal(config)
    for name in ("is_encoder_decoder", "use_bidirectional_attention"):
        other = copy.deepcopy(config)
        setattr(other, name, True)
        assert not causal(other)


def test_grpo_losses_are_those_of_trl_s_head(watched) -> None:
    """On the same completions, at a temperature; then TRL's head is put on as its constructor does."""

    def look(trainer: Any) -> list[Any]:
        base = base_of(trainer.model)
        with torch.no_grad():
            for name, p in base.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        inputs["old_per_token_logps"] = None
        trainer.current_gradient_accumulation_steps = 1
        inputs["advantages"] = torch.linspace(-1, 1, len(inputs["advantages"])).to(inputs["advantages"])
        tokens, answers = torch.tensor(20).to(inputs["advantages"].device), []
        for put in (
            lambda: None,
            lambda: add_fused_lm_head(base, trainer.temperature, False, ("log_probs", "entropy")),
        ):
            put()
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens)
            loss.backward()
            named = trainer.model.named_parameters()
            answers.append((loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}))
        assert trainer._metrics["train"]["entropy"][-1] == pytest.approx(
            trainer._metrics["train"]["entropy"][-2], rel=1e-5
        )
        trainer.model.zero_grad()
        return answers

    words = (*GRPO, "trainer.num_generations=2", "trainer.temperature=0.7", "kernels=[reference]")
    seen = watched(*words, look=look)
    assert seen.ours
    (loss, gradients), (their_loss, their_gradients) = seen.answer
    assert maths.apart(loss, their_loss) <= 1e-5
    assert gradients.keys() == their_gradients.keys()
    assert sum(float(g.norm()) for g in gradients.values()) > 1e-4
    assert max(maths.apart(gradients[name], their_gradients[name]) for name in gradients) <= 1e-5


def test_grpo_s_entropy_bonus_and_its_float32_head_stay_with_trl(watched) -> None:
    words = (*GRPO, "trainer.num_generations=2", "kernels=[reference]")
    assert not watched(*words, "trainer.args={entropy_coef: 0.01}").ours
    assert not watched(*words, "trainer.args={cast_lm_head_to_fp32: true}").ours


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_sixteen_bits(watched, adapter) -> None:
    """Under autocast, where accelerate wraps the forward and rebuilds its output."""
    seen = watched(*SFT, f"adapter={adapter}", "model.dtype=bfloat16", "kernels=[reference]")
    assert seen.ours
    assert seen.trainer.args.bf16
    lines = [entry for entry in logged(seen) if "loss" in entry]
    assert all(0 < entry["loss"] < 7 and 0 < entry["entropy"] < 7 for entry in lines)


def test_sums_of_several_processes() -> None:
    class Two:
        num_processes, device = 2, "cpu"

        def reduce(self, mine: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return mine + torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0])

    class Output:
        entropy_sum, top1_sum, tokens = torch.tensor(0.5), torch.tensor(2), 3

    sums = TokenSums()
    sums.add(Output, 7)
    sums.add(Output, torch.tensor(8))
    assert sums.over_processes(Two()) == TokenSums(entropy=2.0, top1=6.0, supervised=9, read=19, batches=3)
