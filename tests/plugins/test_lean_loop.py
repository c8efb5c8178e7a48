"""The trainers' loop without walks: what the walks were for still happens."""

from __future__ import annotations

import pytest
import torch

from ftcore import pipeline
from ftcore.api import validated


def trainer_of(tmp_path, *more: str):
    """The SFT trainer of a tiny model, as a run makes it."""
    from datasets import Dataset

    from ftcore import hooks as h

    words = ["+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=2", "trainer.micro_batch=2"]
    words += ["trainer.global_batch=4", f"output_dir={tmp_path}/run", *more]
    hooks, plan = pipeline.prepare(validated(words))
    plan.output_dir.mkdir(parents=True)
    loaded = pipeline.load(hooks, plan)
    ids = torch.randint(0, 250, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return hooks.first(
        h.ftcore_make_trainer,
        plan=plan,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        dataset={"train": Dataset.from_dict({"input_ids": ids, "labels": ids})},
        collator=None,
        rewards=[],
        callbacks=[],
        generator=None,
        optimizer=None,
    )


def test_every_module_trains(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.get_base_model().eval()  # as from_pretrained leaves it, while the adapter around it says otherwise
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, *a, **k: (
        seen.append([m.training for m in model.modules()]) or compute(model, *a, **k)
    )
    trainer.train()
    assert len(seen) == 4
    assert all(all(step) for step in seen)


def test_gradients_are_cleared_and_clipped(tmp_path):
    from transformers import TrainerCallback

    norms, left = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(torch.stack([g.norm() for g in grads]).norm().item())

        def on_step_end(self, args, state, control, model=None, **_):
            left.append(sum(p.grad is not None for p in model.parameters()))

    trainer = trainer_of(tmp_path, "trainer.max_grad_norm=0.001")
    trainer.add_callback(Watch())
    trainer.train()
    assert norms == pytest.approx([0.001, 0.001], rel=1e-3)
    assert left == [0, 0]


def test_the_model_is_given_back_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert not {"train", "zero_grad"} & set(vars(trainer.model))
    assert not trainer.model.eval().training


def test_the_statistic_is_transformers_own(tmp_path):
    from transformers import Trainer

    trainer = trainer_of(tmp_path)
    inputs = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0
