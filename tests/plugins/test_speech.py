"""Speech to text: recordings, labels, the word error rate, what is saved and refused."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ftcore.api import run
from ftcore.audio import length, read
from ftcore.errors import Refused
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import load_trained
from ftcore.testing import runs
from ftcore_trainers._hearing import IGNORED, Transcripts
from ftcore_trainers._measures import edits, word_error_rate
from ftcore_trainers._speech_trainer import speak, token_loss

TINY = ("+model=whisper", "model.tiny=true", "model.dtype=float32", "+trainer=speech")
SHORT = ("trainer.max_steps=3", "trainer.global_batch=3", "trainer.max_length=20")
RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440) -> Any:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(samples: Any, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """A WAV file; the same samples in every channel."""
    scale = 2 ** (8 * width - 1) - 1
    whole = np.repeat(np.round(samples * scale).astype("<i4"), channels)
    data = (whole + 128).astype(np.uint8) if width == 1 else whole.view(np.uint8).reshape(-1, 4)[:, :width]
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return memory.getvalue()


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def spoken(folder: Path, samples: Any = None, rate: int = RATE) -> str:
    """Three rows of sound files."""
    for n in range(3):
        sound = tone(pitch=300 * (n + 1)) if samples is None else samples
        (folder / f"{n}.wav").write_bytes(wav(sound, rate))
    return written(folder, [{"audio": f"{n}.wav", "text": text} for n, text in enumerate(("low", "middle", "high"))])


def refused(*words: str) -> str:
    problems = runs.refusals([*TINY, *words])
    assert problems, "the plan takes it"
    assert all(problem.fix for problem in problems)
    return "; ".join(f"{problem.key}: {problem.message}" for problem in problems)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_loss_falls_and_every_folder_hears_alone(adapter: str, tmp_path: Path) -> None:
    path = spoken(tmp_path)
    words = [*TINY, *SHORT, f"adapter={adapter}", f"data.path='{path}'", f"data.eval_path='{path}'"]
    result = run([*words, "+export=[safetensors]", f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert {"eval_wer", "eval_wer_before"} <= set(result.metrics)

    again = load_trained(config_of([f"run={tmp_path / 'run'}"]))
    ours: Any = again.model
    exported = tmp_path / "run" / "export" / "safetensors"
    theirs: Any = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(exported, dtype=torch.float32)
    for folder in (exported, tmp_path / "run" / "trained"):
        extract: Any = transformers.AutoFeatureExtractor.from_pretrained(folder)
        features = extract(tone(), sampling_rate=RATE, return_tensors="pt")
        assert features.input_features.shape == (1, 80, 100)
    inputs = {**features, "decoder_input_ids": torch.tensor([[257, 65, 66]])}
    with torch.no_grad():
        logits = ours.eval()(**inputs).logits
        assert torch.allclose(logits, theirs.eval()(**inputs).logits, atol=1e-2)
        assert theirs.generate(**features, max_new_tokens=4).shape[1] <= 5
    assert logits.std() > 0.01


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_trained_weight_gets_a_gradient_and_positions_stay_fixed(adapter: str) -> None:
    model: Any = runs.loaded([*TINY, f"adapter={adapter}"]).model
    runs.shake(model, trainable_only=True)
    labels = torch.tensor([[65, 66, 258], [67, 258, IGNORED]])
    model(input_features=torch.randn(2, 80, 100), labels=labels).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    # Of the decoder's positions only the first three are looked at, so that their gradient is not all zero.
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.any()] == []
    assert not [name for name in trained if "encoder.embed_positions" in name]
    assert any(".encoder." in name for name in trained)
    assert any(".decoder." in name for name in trained)


def collator(**given: Any) -> Transcripts:
    tokenizer = runs.loaded(list(TINY)).tokenizer
    extract = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    settings = {"start": 257, "prefix": (7,), "max_length": 10, "dtype": torch.float32} | given
    return Transcripts(extract=extract, tokenizer=tokenizer, **settings)


def test_labels_are_prefix_words_and_end_and_inputs_are_one_behind() -> None:
    collate = collator()
    words = collate.tokenizer("ab").input_ids
    end, pad = collate.tokenizer.eos_token_id, collate.tokenizer.pad_token_id
    rows = [{"audio": wav(tone()), "text": "ab"}, {"audio": wav(tone()), "text": "a"}]
    batch = collate(rows)
    assert batch["labels"].tolist() == [[7, *words, end], [7, words[0], end, IGNORED]]
    assert batch["decoder_input_ids"].tolist() == [[257, 7, *words], [257, 7, words[0], pad]]
    assert batch["input_features"].shape == (2, 80, 100)
    with pytest.raises(Refused, match=r"has 12 tokens, more than trainer\.max_length=10"):
        collate([{"audio": wav(tone()), "text": "abcdefghij"}])


def test_labels_begin_as_the_tokenizer_or_its_vocabulary_says() -> None:
    """Whisper's own tokenizer knows language and task; a plain one may have the token for text without times."""

    class Own:
        prefix_tokens = (1, 2)

        def set_prefix_tokens(self, language: str, task: str) -> None:
            self.prefix_tokens = (1, len(language), len(task), 2)

    loaded = runs.loaded(list(TINY))
    model: Any = loaded.model.get_base_model()  # type: ignore[operator]
    assert speak(model, loaded.tokenizer, None, "transcribe") == ()
    loaded.tokenizer.add_tokens(["<|notimestamps|>"])
    assert speak(model, loaded.tokenizer, None, "transcribe") == (259,)
    with pytest.raises(Refused, match="knows no languages"):
        speak(model, loaded.tokenizer, "fr", "transcribe")
    assert speak(model, Own(), None, "transcribe") == (2,)
    assert getattr(model.generation_config, "language", None) is None
    assert speak(model, Own(), "fr", "translate") == (2, 9, 2)
    assert (model.generation_config.language, model.generation_config.task) == ("fr", "translate")


def test_loss_counts_the_tokens_of_the_whole_step() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3], [4, IGNORED, IGNORED]])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert torch.isclose(token_loss({"logits": logits}, labels), each.sum() / 4)
    assert torch.isclose(token_loss({"logits": logits}, labels, torch.tensor(10)), each.sum() / 10)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_recordings_as_path_bytes_and_samples(width: int, channels: int, tmp_path: Path) -> None:
    samples, data = tone(0.1), wav(tone(0.1), width=width, channels=channels)
    file = tmp_path / "sound.wav"
    file.write_bytes(data)
    for audio in (str(file), data, {"path": str(file)}, {"bytes": data, "path": None}):
        found, rate = read(audio)
        assert rate == RATE
        assert found.dtype == np.float32
        assert np.abs(found - samples).max() < 2.5 / 2 ** (8 * width - 1) + 1e-6
        assert length(audio) == (RATE, pytest.approx(0.1))
    found, rate = read({"array": samples.tolist(), "sampling_rate": 8000})
    assert rate == 8000
    assert np.array_equal(found, samples)
    assert np.allclose(read({"array": np.stack([samples, -samples]), "sampling_rate": 8000})[0], 0)


def test_samples_that_are_not_what_they_seem() -> None:
    pairs = np.stack([np.zeros(1000), np.full(1000, 0.5)], axis=1)
    assert np.allclose(read({"array": pairs, "sampling_rate": 8000})[0], np.full(1000, 0.25))
    with pytest.raises(Refused, match=r"reach 1544, and lie from -1 to 1"):
        read({"array": [0, 812, -1544], "sampling_rate": 8000})


def test_a_recording_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcore.audio._soundfile", lambda: None)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(2), out.setsampwidth(2), out.setframerate(8000)
        out.writeframes(b"\0" * 4000)
    assert len(read(file.getvalue())[0]) == 1000
    for missing in (1, 3, 400):
        with pytest.raises(Refused, match="ends before its time"):
            length(file.getvalue()[:-missing])
        with pytest.raises(Refused, match="ends before its time"):
            read(file.getvalue()[:-missing])


def test_rows_with_samples_train(tmp_path: Path) -> None:
    rows = [{"audio": {"array": tone(0.2).tolist(), "sampling_rate": RATE}, "text": word} for word in ("one", "two")]
    words = [*TINY, *SHORT, "trainer.global_batch=2", f"data.path='{written(tmp_path, rows)}'"]
    metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
    assert metrics["loss_last"] < metrics["loss_first"]


def test_a_long_transcript_is_told_before_the_first_step(tmp_path: Path) -> None:
    """Here a step would not even draw it."""
    audio = {"array": tone(0.2).tolist(), "sampling_rate": RATE}
    rows = [{"audio": audio, "text": word} for word in ("many words " * 9, *["one"] * 9)]
    words = [*TINY, *SHORT, "trainer.max_steps=1", "trainer.global_batch=1", f"data.path='{written(tmp_path, rows)}'"]
    with pytest.raises(Refused, match=r"more than trainer\.max_length=20: many words"):
        run([*words, f"output_dir='{tmp_path / 'run'}'"])


def test_word_error_rate_by_hand() -> None:
    assert edits(["a", "b", "c", "d"], ["a", "x", "c"]) == 2
    assert edits([], ["a", "b"]) == 2
    assert word_error_rate(["Hello, world!", "one two three"], ["hello world", "one too three four"]) == 2 / 5
    assert word_error_rate(["a"], ["b c d"]) == 3


def test_mistakes_are_told_before_weights_load(tmp_path: Path) -> None:
    slow, long, gone, broken, texts = (tmp_path / name for name in ("slow", "long", "gone", "broken", "texts"))
    for folder in (slow, long, gone, broken, texts):
        folder.mkdir()
    said = refused(f"data.path='{spoken(slow, tone(rate=8000), 8000)}'")
    assert "slow/rows.jsonl:1: the recording has 8000 samples a second, and the model takes 16000" in said
    said = refused(f"data.path='{spoken(long, tone(1.5))}'")
    assert "long/rows.jsonl:1: the recording lasts 1.5 s, and the model hears 1 s at once" in said
    spoken(gone)
    (gone / "1.wav").unlink()
    assert "there is no file 1.wav" in refused(f"data.path='{gone / 'rows.jsonl'}'")
    spoken(broken)
    (broken / "2.wav").write_bytes(b"no sound at all")
    assert "broken/rows.jsonl:3: the recording cannot be read" in refused(f"data.path='{broken / 'rows.jsonl'}'")
    rows = written(texts, [{"text": "words alone"}])
    assert "rows.jsonl:1: has no column 'audio'" in refused(f"data.path='{rows}'")
    assert "text rows have the shape 'text', but speech takes audio" in refused(f"data.path='{rows}'", "data=text")


def test_settings_are_checked_before_weights_load(tmp_path: Path) -> None:
    path = f"data.path='{spoken(tmp_path)}'"
    assert "trainer.max_length: 449 tokens are more than the decoder's 448" in refused(path, "trainer.max_length=449")
    assert "trainer.language: the checkpoint knows English only" in refused(path, "trainer.language=fr")
    assert "trainer.task: 'sing' is no task" in refused(path, "trainer.task=sing")
    several = ["+model=whisper", f"model.path='{tmp_path / 'checkpoint'}'", "+trainer=speech", path]
    transformers.WhisperConfig(vocab_size=51865).save_pretrained(tmp_path / "checkpoint")
    assert [problem.key for problem in runs.refusals(several)] == ["trainer.language"]
    assert "model.max_length: positions are learned" in refused(path, "model.max_length=900")
    assert runs.refusals([*several, "trainer.language=fr"]) == ()
    assert "no language 'elvish'" in runs.refusals([*several, "trainer.language=elvish"])[0].message


def test_text_trainers_and_text_models_are_refused(tmp_path: Path) -> None:
    path = f"data.path='{spoken(tmp_path)}'"
    problems = runs.refusals(["+model=whisper", "model.tiny=true", "+trainer=sft"])
    assert any(problem.fix == "use +trainer=speech" for problem in problems)
    problems = runs.refusals(["+model=llama", *TINY[1:], path])
    assert any("transformers has no AutoModelForSpeechSeq2Seq of llama" in problem.message for problem in problems)
