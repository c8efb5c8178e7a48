"""What a checkpoint lacks, and what it means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ftcore
from ftcore import pipeline
from ftcore.testing import runs


def test_a_new_head_begins_by_the_seed(tmp_path: Path) -> None:
    """Whatever was drawn before, and nothing that is drawn after it is another."""
    model, tokenizer = ftcore.load(["+model=llama", "model.tiny=true", "adapter=full"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def head(seed: int) -> torch.Tensor:
        words = ["+model=llama", f"model.path={tmp_path}", "+trainer=reward", f"trainer.seed={seed}", "adapter=full"]
        hooks, plan = runs.prepared(words)
        found: torch.Tensor = pipeline.load(hooks, plan).model.score.weight.detach()
        return found.clone()

    torch.manual_seed(5)
    first = head(1)
    torch.manual_seed(6)
    assert torch.equal(head(1), first)
    assert not torch.equal(head(2), first)


@pytest.mark.parametrize(("own", "draws"), [({"temperature": 0.9}, True), ({"top_k": 50}, False), ({}, False)])
def test_settings_for_drawing_can_be_saved(own: dict[str, float], draws: bool, tmp_path: Path) -> None:
    """transformers saves none that say otherwise, once somebody has changed another."""
    model, tokenizer = ftcore.load(["+model=llama", "model.tiny=true", "adapter=full"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    again, _ = ftcore.load(["+model=llama", f"model.path={tmp_path}", "adapter=full"])
    assert bool(again.generation_config.do_sample) is draws
    again.generation_config.pad_token_id = 1
    again.save_pretrained(tmp_path / "again")
