"""Completions of models whose upper layers see a window, where the family's tiny model has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generators_on_tiny import prompts_of

from ftcore import Sampling, pipeline
from ftcore import hooks as h
from ftcore.testing import runs
from ftcore_generators.transformers import TransformersGenerator

WINDOW = 8


def test_qwen3_s_window_is_kept_to(tmp_path: Path) -> None:
    tiny = runs.loaded(["+model=qwen3", "model.tiny=true", "model.dtype=float32", "adapter=full"])
    own: Any = tiny.model.config
    windows = {"layer_types": None, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    config = type(own)(**(own.to_dict() | windows))
    assert "sliding_attention" in config.layer_types
    model: Any = type(tiny.model)(config)
    runs.shake(model)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    words = ["+model=qwen3", f"model.path='{tmp_path / 'base'}'", "model.dtype=float32", "+trainer=grpo"]
    hooks, plan = runs.prepared([*words, "generator=fast"])
    loaded = pipeline.load(hooks, plan)
    fast: Any = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    plain = TransformersGenerator(loaded.model, loaded.tokenizer, 8)
    asked, greedy = prompts_of(3, 2 * WINDOW, 3 * WINDOW + 1), Sampling(max_new_tokens=WINDOW + 4, temperature=0.0)
    assert fast.generate(asked, greedy).ids == plain.generate(asked, greedy).ids
