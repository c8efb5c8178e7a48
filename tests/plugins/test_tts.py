"""Text to speech: Orpheus' rows of codes and of recordings, CSM's utterances and its two losses, what is refused."""

from __future__ import annotations

import json
import sys
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ftcore.api import run
from ftcore.audio import read
from ftcore.errors import Refused
from ftcore.tasks import chat
from ftcore.testing import maths, runs
from ftcore_data.codes import frames
from ftcore_models import _snac
from ftcore_models._orpheus_rows import SpeechRows
from ftcore_models.csm import AUDIO, AUDIO_END
from ftcore_trainers._tts_trainer import VoiceTrainer, embedded
from ftcore_trainers._utterances import IGNORED, Utterances

RATE = 24000
FRAME = [1, 22, 333, 4, 4095, 0, 6]
ORPHEUS = ("+model=orpheus", "model.tiny=true", "model.dtype=float32")
CSM = ("+model=csm", "model.tiny=true", "model.dtype=float32")
TTS = (*CSM, "+trainer=tts")


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"'{file}'"


def samples(seconds: float, seed: int = 0) -> Any:
    """Noise whose loudness changes: each frame has codes of its own."""
    count = int(seconds * RATE)
    loud = np.linspace(0.1, 0.9, count)
    return (loud * np.random.default_rng(seed).uniform(-1, 1, count)).astype(np.float32)


def recorded(folder: Path, rate: int = RATE, seconds: float = 0.4, speakers: Sequence[Any] = (0, 1, 1)) -> str:
    """Three rows of sound files of different lengths."""
    rows = []
    for n, speaker in enumerate(speakers):
        with wave.open(str(folder / f"{n}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes((samples(seconds + 0.1 * n, n) * 32767).astype("<i2").tobytes())
        rows.append({"audio": f"{n}.wav", "text": f"number {n}", "speaker": speaker})
    return written(folder, rows)


def refused(*words: str) -> dict[str, str]:
    """Key to message of what the plan refuses."""
    problems = runs.refusals(words)
    assert all(problem.fix for problem in problems)
    return {problem.key: problem.message for problem in problems}


# Codes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 128266])
def test_all_forms_of_codes_are_one(start: int) -> None:
    """Plain, with their place in the frame, as token ids, and as SNAC's own three lists."""
    plain = FRAME + [code // 2 for code in FRAME]
    assert frames(plain) == plain
    assert frames([start + 4096 * (place % 7) + code for place, code in enumerate(plain)]) == plain
    second = plain[7:]
    layers = [[FRAME[0], second[0]], [FRAME[1], FRAME[4], second[1], second[4]]]
    layers += [[*FRAME[2:4], *FRAME[5:], *second[2:4], *second[5:]]]
    assert frames(layers) == plain


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([*FRAME[:6], 4096], "holds 4096 as number 7, beyond SNAC's codebook\nthere, codes are from 0 to 4095"),
        ([0, 4097, 5, *FRAME[3:]], "from 8192 to 12287"),
        ([128266, 132362, 9, *FRAME[3:]], "there, token ids of Orpheus are from 136458 to 140553"),
        ([1, 20000, *FRAME[2:]], "holds 20000 as number 2, which no code is"),
        (FRAME[:6], "holds 6 codes, which are no whole frames"),
        ([[1], [2], [3]], "holds lists of 1, 1, 1 codes"),
        ([[], [], []], "holds lists of 0, 0, 0 codes"),
        ([1, 2, "3", *FRAME[3:]], "holds '3', which is no code"),
        ([], "is empty"),
        ("1 2 3", "is text, not a list"),
    ],
)
def test_what_codes_are_not(values: Any, reason: str) -> None:
    found = frames(values)
    assert isinstance(found, str)
    assert reason in found
    assert "\n" in found


# Orpheus ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return runs.loaded(ORPHEUS).tokenizer


def test_words_are_read_and_codes_are_trained(tokenizer: Any) -> None:
    """As Orpheus' own scripts write a row, token by token."""
    (made,) = SpeechRows(tokenizer, 100, "none", "cpu")(
        {"text": "Hi <custom_token_3>", "speaker": "tara", "codes": FRAME}
    )
    tokens = tokenizer.convert_ids_to_tokens(made["input_ids"])
    said = ["<custom_token_5>", "<custom_token_1>"]
    said += [f"<custom_token_{10 + 4096 * place + code}>" for place, code in enumerate(FRAME)]
    said += ["<custom_token_2>", "<custom_token_6>"]
    assert tokens[:2] == ["<custom_token_3>", "<|begin_of_text|>"]
    assert tokenizer.decode(made["input_ids"][2 : -len(said) - 2]) == "tara: Hi <custom_token_3>"
    assert "<custom_token_3>" not in tokens[2:]  # what the words say is no mark
    assert tokens[-len(said) - 2 :] == ["<|eot_id|>", "<custom_token_4>", *said]
    assert made["labels"] == [IGNORED] * (len(tokens) - len(said)) + made["input_ids"][-len(said) :]


def test_published_ids(tokenizer: Any) -> None:
    """The first code's token is the tenth after Llama's 128,256."""
    first = tokenizer.convert_tokens_to_ids("<custom_token_0>")
    (made,) = SpeechRows(tokenizer, 100, "none", "cpu")({"text": "a", "codes": FRAME})
    ids = [token - first + 128256 for token in made["input_ids"] if token >= first]
    codes = [128266 + 4096 * place + code for place, code in enumerate(FRAME)]
    assert ids == [128259, 128260, 128261, 128257, *codes, 128258, 128262]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_orpheus_learns_to_speak(packing: str, tmp_path: Path) -> None:
    rows = [{"text": f"number {n}", "codes": [code + n for code in FRAME[:4]] + FRAME[:3]} for n in range(4)]
    words = [*ORPHEUS, "+trainer=sft", f"data.path={written(tmp_path, rows)}", f"trainer.packing={packing}"]
    words += ["trainer.max_steps=3", "trainer.global_batch=4", "trainer.max_length=64"]
    metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
    assert metrics["loss_last"] < metrics["loss_first"]


def test_a_row_is_never_cut(tmp_path: Path) -> None:
    rows = [{"text": "a", "codes": FRAME}, {"text": "b", "codes": FRAME * 9}]
    path = written(tmp_path, rows)
    words = [*ORPHEUS, "+trainer=sft", f"data.path={path}", "trainer.max_steps=1"]
    with pytest.raises(Refused) as told:
        run([*words, "trainer.max_length=50", f"output_dir='{tmp_path / 'short'}'"])
    (problem,) = told.value.problems
    assert problem.key.endswith("rows.jsonl:2")
    assert problem.fix.startswith("set trainer.max_length=72,")
    assert run([*words, "trainer.max_length=72", f"output_dir='{tmp_path / 'long'}'"]).metrics["loss_first"] > 0


def test_who_has_no_tokens_of_speech_is_refused(tmp_path: Path) -> None:
    path = f"data.path={written(tmp_path, [{'text': 'a', 'codes': FRAME}])}"
    said = refused("+model=llama", "model.tiny=true", "+trainer=sft", path)
    assert said == {"data": "the rows are speech, for which llama has no tokens"}
    llama = runs.loaded(["+model=llama", "model.tiny=true"])
    llama.tokenizer.save_pretrained(tmp_path / "llama")
    llama.model.get_base_model().config.save_pretrained(tmp_path / "llama")  # type: ignore[operator]
    said = refused("+model=orpheus", f"model.path='{tmp_path / 'llama'}'", "+trainer=sft", path)
    assert "no tokens of speech, <custom_token_0> to <custom_token_28681>" in said["model"]
    with pytest.raises(Refused, match="has no token <custom_token_10>"):
        SpeechRows(llama.tokenizer, 100, "none", "cpu")
    said = refused(*ORPHEUS, "+trainer=sft", path, "prompts=[Hi]")
    assert said == {"prompts": "a model that learns to speak answers in codes, not in words"}


@pytest.fixture
def codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a codec, and in the place of the package snac one that hears the same in every frame but one."""

    class SNAC:
        """`encode` as the package's: `[1, 1, samples]` -> three layers `[1, n]`, `[1, 2n]` and `[1, 4n]`."""

        @classmethod
        def from_pretrained(cls, place: str) -> SNAC:
            assert json.loads((Path(place) / "config.json").read_text())["sampling_rate"] == RATE
            return cls()

        def eval(self) -> SNAC:
            return self

        def to(self, device: str) -> SNAC:
            assert device == "cpu"
            return self

        def encode(self, audio: torch.Tensor) -> list[torch.Tensor]:
            assert audio.shape[:2] == (1, 1)
            count = -(-audio.shape[-1] // 2048)
            first = torch.full((1, count), 7)
            first[0, -1] = 8
            return [first, torch.arange(2 * count)[None], 100 + torch.arange(4 * count)[None]]

    module: Any = ModuleType("snac")
    module.SNAC, module.__spec__ = SNAC, SimpleNamespace(name="snac")
    monkeypatch.setitem(sys.modules, "snac", module)
    config = {"sampling_rate": RATE, "vq_strides": [4, 2, 1]}
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "config.json").write_text(json.dumps(config))
    return tmp_path / "codec"


def test_recordings_become_codes(codec: Path, tokenizer: Any) -> None:
    """Frame by frame, without those that repeat the first code of the one before."""
    wave_form = {"array": samples(3 * 2048 / RATE).tolist(), "sampling_rate": RATE}
    make = SpeechRows(tokenizer, 100, str(codec), "cpu")
    (made,) = make({"text": "a", "audio": wave_form})
    expected = [7, 0, 100, 101, 1, 102, 103, 8, 4, 108, 109, 5, 110, 111]
    assert make({"text": "a", "codes": expected}) == [made]
    with pytest.raises(Refused, match="8000 a second, and the codec takes 24000"):
        make({"text": "a", "audio": {**wave_form, "sampling_rate": 8000}})


def test_recordings_need_their_codec(codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*ORPHEUS, "+trainer=sft", f"data.path={recorded(tmp_path)}"]
    assert refused(*words, f"model.codec='{codec}'") == {}
    metrics = run([*words, f"model.codec='{codec}'", "trainer.max_steps=2", f"output_dir='{tmp_path / 'run'}'"]).metrics
    assert metrics["loss_last"] < metrics["loss_first"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"sampling_rate": 32000}')
    assert "is another than SNAC at 24000" in refused(*words, f"model.codec='{other}'")["model.codec"]
    monkeypatch.setattr(_snac, "_from_hub", lambda place: None)
    assert "cannot be had from the hub" in refused(*words)["model.codec"]
    slow = tmp_path / "slow"
    slow.mkdir()
    said = refused(*ORPHEUS, "+trainer=sft", f"data.path={recorded(slow, 16000)}", f"model.codec='{codec}'")
    assert list(said.values()) == ["the recording has 16000 samples a second, and the model takes 24000"]
    monkeypatch.delitem(sys.modules, "snac")
    monkeypatch.setattr("importlib.util.find_spec", _without(_snac.importlib.util.find_spec, "snac"))
    (problem,) = runs.refusals(words)
    assert problem.message == "recordings become codes by the package snac, which is not installed"
    assert problem.fix.startswith("pip install 'ftcore[orpheus]'")


def _without(find: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda asked, *rest: None if asked == name else find(asked, *rest)


def test_the_package_itself(tmp_path: Path) -> None:
    """A small random codec of the published layout."""
    snac = pytest.importorskip("snac")
    config = {"sampling_rate": RATE, "encoder_dim": 4, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 16}
    config |= {"decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "vq_strides": [4, 2, 1]}
    model = snac.SNAC(**config).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert _snac.missing(str(tmp_path)) is None
    wave_form = samples(0.5)
    with torch.no_grad():
        layers = model.encode(torch.from_numpy(wave_form)[None, None])
    assert [layer.shape[1] for layer in layers] == [6, 12, 24]
    whole = frames([layer[0].tolist() for layer in layers])
    assert isinstance(whole, list)
    assert _snac.Snac(str(tmp_path), "cpu").codes(wave_form, RATE) == _snac.without_repeats(whole)


# CSM ----------------------------------------------------------------------------------------------------------------


def utterances() -> list[dict[str, Any]]:
    return [
        {"audio": {"array": samples(s, n), "sampling_rate": RATE}, "text": text, "speaker": speaker}
        for n, (s, text, speaker) in enumerate(((0.5, "one", "0"), (0.21, "twenty-one", "12"), (0.32, "three", None)))
    ]


def as_transformers(loaded: Any, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The same rows by transformers' processor."""
    extract = transformers.EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE)
    processor: Any = transformers.CsmProcessor(extract, loaded.tokenizer, loaded.tokenizer.chat_template)
    texts = [f"[{row['speaker'] or 0}]{row['text']}{loaded.tokenizer.eos_token}{AUDIO}{AUDIO_END}" for row in rows]
    audio = [read(row["audio"])[0] for row in rows]
    return dict(processor(text=texts, audio=audio, output_labels=True, sampling_rate=RATE))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_loss_and_gradients_are_transformers_own(adapter: str, tmp_path: Path) -> None:
    """Of plain transformers, fed by its own processor; ours with codes computed beforehand, and with kernels."""
    plain = runs.loaded([*CSM, f"adapter={adapter}", "kernels=[]"])
    ours = runs.loaded([*CSM, f"adapter={adapter}"])
    runs.shake(plain.model, trainable_only=True)
    ours.model.load_state_dict(plain.model.state_dict())
    rows = utterances()
    theirs = maths.loss_and_gradients(plain.model, as_transformers(plain, rows))
    base = getattr(ours.model, "get_base_model", lambda: ours.model)()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = VoiceTrainer(model=ours.model, args=arguments)
    loss = trainer.compute_loss(ours.model, Utterances.of(base, ours.tokenizer, 100)(rows))
    ours.model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    maths.assert_same_step((loss.detach(), gradients), theirs, 1e-5)


def test_frames_are_what_the_codec_hears() -> None:
    loaded: Any = runs.loaded([*CSM, "adapter=full"])
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = utterances()
    rows[0]["text"] = f"{AUDIO} {AUDIO_END}"  # words, however they look
    batch = Utterances.of(model, tokenizer, 100)(rows)
    for n, row in enumerate(rows):
        wave_form = torch.from_numpy(row["audio"]["array"])[None, None]
        heard = model.codec_model.encode(wave_form).audio_codes[0].T
        marks = batch["input_ids"][n] == model.config.audio_token_id
        assert torch.equal(batch["codes"][n][marks], heard)
        assert len(heard.unique()) > len(heard)  # or a mistake in their order would not show
        end = batch["input_ids"][n] == model.config.audio_eos_token_id
        assert batch["codes"][n][end].tolist() == [[0] * 4]
        assert (batch["codes"][n][~(marks | end)] == IGNORED).all()
        words = batch["input_ids"][n][: int(marks.nonzero()[0])].tolist()
        assert tokenizer.decode(words) == f"[{row['speaker'] or 0}]{row['text']}<|im_end|>"
    assert torch.equal(batch["labels"], batch["codes"][..., 0])
    hidden = embedded(model, batch["input_ids"], batch["codes"])
    assert hidden.shape == (*batch["labels"].shape, 64)


@pytest.mark.slow
def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Rows of different lengths: a mean of the micro-batches' means would be another loss."""
    path = recorded(tmp_path, seconds=0.1)
    found = []
    for size in (1, 3):
        words = [*TTS, f"data.path={path}", "trainer.global_batch=3", f"trainer.micro_batch={size}"]
        words += ["trainer.max_steps=2", "trainer.learning_rate=0.01", f"output_dir='{tmp_path / str(size)}'"]
        found.append(run(words).metrics)
    for name in ("loss_first", "loss_last"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_what_is_saved_speaks_and_its_codec_is_untouched(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    words = [*CSM[:2], "model.dtype=bfloat16", "+trainer=tts", f"data.path={path}", f"data.eval_path={path}"]
    words += ["trainer.max_steps=3", "trainer.learning_rate=0.003", "+export=[safetensors]"]
    metrics = run([*words, f"output_dir='{tmp_path / 'run'}'"]).metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    exported = tmp_path / "run" / "export" / "safetensors"
    model: Any = transformers.AutoModelForTextToWaveform.from_pretrained(exported)
    weights, before = load_file(exported / "model.safetensors"), _published()
    codec = {name for name in weights if name.startswith("codec_model.")}
    assert codec == {name for name in before if name.startswith("codec_model.")}
    assert [name for name in codec if not torch.equal(weights[name], before[name])] == []
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    processor: Any = transformers.AutoProcessor.from_pretrained(exported)
    asked = [{"role": "0", "content": [{"type": "text", "text": "Hi"}]}]
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True)
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "[0]Hi<|im_end|>"
    (spoken,) = model.float().generate(**inputs, max_new_tokens=2, output_audio=True)
    assert spoken.numel() == 2 * 1920


def _published() -> dict[str, torch.Tensor]:
    """The weights of the tiny checkpoint, with codebooks that are not all zero."""
    from ftcore.merge import write_merged

    loaded = runs.loaded([*CSM, "adapter=full", "kernels=[]"])
    with TemporaryDirectory() as folder:
        return load_file(
            write_merged(loaded.model, loaded.tokenizer, Path(folder) / "m", "float32") / "model.safetensors"
        )


def test_as_many_frames_as_codebooks() -> None:
    """Where plain transformers mistakes the positions of one frame for those of all."""
    loaded: Any = runs.loaded([*CSM, "adapter=full", "kernels=[]"])
    batch = Utterances.of(loaded.model, loaded.tokenizer, 100)(utterances()[1:2])
    assert (batch["labels"] != IGNORED).sum() == 4
    hidden = embedded(loaded.model, batch["input_ids"], batch["codes"])
    alone = loaded.model(inputs_embeds=hidden, labels=batch["codes"])
    twice = loaded.model(inputs_embeds=hidden.repeat(2, 1, 1), labels=batch["codes"].repeat(2, 1, 1))
    assert torch.isclose(alone.loss, twice.loss)
    assert torch.allclose(alone.depth_decoder_logits, twice.depth_decoder_logits[:4], atol=1e-5)


@pytest.mark.parametrize("words", [("adapter=full",), (), ("+quantizer=bnb_nf4",)])
def test_the_codec_stays_as_it_is(words: Sequence[str]) -> None:
    model: Any = runs.loaded([*CSM, *words]).model
    inside = {name: p for name, p in model.named_parameters() if "codec_model." in name}
    assert inside
    assert not [name for name, p in inside.items() if p.requires_grad or "lora" in name]
    assert {p.dtype for p in inside.values()} == {torch.float32}
    assert any("depth_decoder." in name for name, p in model.named_parameters() if p.requires_grad)
    if "+quantizer=bnb_nf4" in words:
        packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
        assert any("backbone_model" in name for name in packed)
        assert not [name for name in packed if "codec_model" in name]


def test_csm_is_refused_what_it_cannot_do(tmp_path: Path) -> None:
    path = f"data.path={recorded(tmp_path)}"
    assert refused(*TTS, path) == {}
    (problem,) = runs.refusals([*CSM, "+trainer=sft", path])
    assert (problem.key, problem.fix) == ("trainer", "use +trainer=tts")
    problems = runs.refusals([*CSM, "+trainer=speech", path])
    assert any(problem.fix == "use +trainer=tts" for problem in problems)
    problems = runs.refusals([*ORPHEUS, "+trainer=tts", path])
    assert any(problem.fix == "use +trainer=sft" for problem in problems)
    whisper = refused("+model=whisper", "model.tiny=true", "+trainer=tts", path)
    assert "no AutoModelForTextToWaveform of whisper" in whisper["trainer"]
    assert list(refused(*TTS, path, "model.new_tokens=[x]")) == ["model.new_tokens"]
    assert "trainer.packing" in refused(*TTS, path, "trainer.packing=true")
    assert "prompts" in refused(*TTS, path, "prompts=[Hi]")
    assert "trainer.args.bf16" in refused(*TTS, path, "trainer.args.bf16=true")


def test_who_speaks_is_not_chatted_with() -> None:
    with pytest.raises(Refused, match="AutoModelForTextToWaveform writes no text"):
        chat.main(list(CSM))


def test_recordings_that_do_not_fit(tmp_path: Path) -> None:
    slow, named, long = (tmp_path / name for name in ("slow", "named", "long"))
    for folder in (slow, named, long):
        folder.mkdir()
    said = refused(*TTS, f"data.path={recorded(slow, 16000)}")
    assert list(said.values()) == ["the recording has 16000 samples a second, and the model takes 24000"]
    said = refused(*TTS, f"data.path={recorded(named, speakers=(0, 'tara', 1))}")
    assert list(said.values()) == ["the speaker 'tara' is no number"]
    assert next(iter(said)).endswith("rows.jsonl:2")
    path = recorded(long, seconds=1)
    said = refused(*TTS, f"data.path={path}", "trainer.max_length=13")
    assert list(said.values()) == ["the recording lasts 1.1 s, which is 13 frames, more than trainer.max_length=13"]
    with pytest.raises(Refused, match=r"tokens and frames, more than trainer\.max_length=20: number"):
        run([*TTS, f"data.path={path}", "trainer.max_length=20", f"output_dir='{tmp_path / 'run'}'"])


def test_the_shipped_rows_have_the_codecs_rate() -> None:
    for words in (TTS, (*ORPHEUS, "+trainer=sft", "data=audio")):
        messages = refused(*words).values()
        assert not [message for message in messages if "samples a second" in message]
    assert runs.prepared(TTS)[1].format.sample.endswith("voices.jsonl")  # type: ignore[union-attr]
