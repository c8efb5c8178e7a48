"""The contract of every model family."""

from pathlib import Path
from typing import Any

import torch

from ftcore.api import run
from ftcore.testing import ModelContract, runs

pytest_plugins = ["ftcore.testing"]


class EncoderContract(ModelContract):
    """What has no next token to predict is trained with a head of its own, and holds no conversations."""

    trained_by = ("+trainer=classify", "trainer.learning_rate=1e-4")

    def test_packed_is_unpacked(self) -> None:
        problems = runs.refusals([*self.tiny(), "+trainer=sft", "trainer.packing=true"])
        assert "trainer" in [problem.key for problem in problems]
        assert all(problem.message and problem.fix for problem in problems)

    def test_three_steps_of_sft(self, tmp_path: Path) -> None:
        words = [*self.tiny(), *self.trained_by, "trainer.max_steps=3", "trainer.max_length=160"]
        metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
        assert metrics["loss_last"] < metrics["loss_first"]

    def test_chat_template_trains_the_answers_and_nothing_else(self) -> None:
        assert self.family().chat is None
        assert self.family().limits


class TestBert(EncoderContract, ModelContract):
    plugin = "model/bert"
    ungraded = ("key.bias",)  # the softmax does not see what all keys have in common


class TestCsm(EncoderContract, ModelContract):
    plugin = "model/csm"
    trained_by = ("+trainer=tts",)

    def batch(self, model: Any) -> dict[str, torch.Tensor]:
        """Two utterances as transformers' processor gives them, the second shorter and padded on the left."""
        config, drawn = model.config, torch.Generator().manual_seed(1)
        words, frames = torch.randint(0, 256, (2, 6), generator=drawn), (4, 2)
        ids = torch.full((2, 11), 256)
        for row, count in enumerate(frames):
            speech = [config.audio_token_id] * count + [config.audio_eos_token_id]
            ids[row, -6 - len(speech) :] = torch.tensor([*words[row].tolist(), *speech])
        samples = 0.3 * torch.randn((2, 1, 1920 * max(frames)), generator=drawn)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 256).long(),
            "input_values": samples,
            "input_values_cutoffs": torch.tensor([[1920 * count] for count in frames]),
            "labels": torch.where(ids >= config.audio_token_id, ids, -100),
        }


class TestDeepseekV3(ModelContract):
    plugin = "model/deepseek_v3"
    absent_targets = ("q_proj",)  # where queries have no latent


class TestGemma(ModelContract):
    plugin = "model/gemma"


class TestGemma2(ModelContract):
    plugin = "model/gemma2"


class TestGemma3(ModelContract):
    plugin = "model/gemma3"


class TestGemma3Vision(ModelContract):
    plugin = "model/gemma3_vision"
    ungraded = ("self_attn.k_proj.bias",)  # softmax is blind to what all keys have in common


class TestGemma3n(ModelContract):
    plugin = "model/gemma3n"


class TestGptOss(ModelContract):
    plugin = "model/gpt_oss"


class TestLfm2(ModelContract):
    plugin = "model/lfm2"


class TestLlama(ModelContract):
    plugin = "model/llama"


class TestLlama4(ModelContract):
    plugin = "model/llama4"


class TestMistral(ModelContract):
    plugin = "model/mistral"


class TestMixtral(ModelContract):
    plugin = "model/mixtral"


class TestModernBert(EncoderContract, ModelContract):
    plugin = "model/modernbert"


class TestMllama(ModelContract):
    plugin = "model/mllama"
    ungraded = ("global_transformer.layers.0.gate_attn",)  # a sum that cancels: float32 is 8e-5 off float64 there


class TestOrpheus(ModelContract):
    plugin = "model/orpheus"

    def test_three_steps_of_sft(self, tmp_path: Path) -> None:
        words = [*self.tiny(), "+trainer=sft", "trainer.max_steps=3", "data=codes"]
        metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
        assert metrics["loss_last"] < metrics["loss_first"]


class TestPhi3(ModelContract):
    plugin = "model/phi3"


class TestPixtral(ModelContract):
    plugin = "model/pixtral"


class TestQwen2(ModelContract):
    plugin = "model/qwen2"


class TestQwen25VL(ModelContract):
    plugin = "model/qwen2_5_vl"


class TestQwen2VL(ModelContract):
    plugin = "model/qwen2_vl"


class TestQwen3(ModelContract):
    plugin = "model/qwen3"


class TestQwen3Moe(ModelContract):
    plugin = "model/qwen3_moe"


class TestQwen3VL(ModelContract):
    plugin = "model/qwen3_vl"


class TestSmolLM2(ModelContract):
    plugin = "model/smollm2"


class TestWhisper(EncoderContract, ModelContract):
    plugin = "model/whisper"
    trained_by = ("+trainer=speech",)

    def batch(self, model: Any) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 256, (2, 12), generator=drawn)
        labels[1, -4:] = -100
        frames = 2 * model.config.max_source_positions
        return {
            "input_features": torch.randn((2, model.config.num_mel_bins, frames), generator=drawn),
            "decoder_input_ids": labels.clamp(min=0).roll(1, dims=1),
            "labels": labels,
        }
