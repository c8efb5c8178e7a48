"""Damaged and hostile files: what ftcore reads itself ends soon, in one typed error or in a sound value."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ftcore import checkpoint, foreign_yaml
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.chat import render
from ftcore.cli import short
from ftcore.composition import compose
from ftcore.config import ModelConfig
from ftcore.errors import FtcoreError, Refused
from ftcore.llama_cpp import LlamaCpp
from ftcore.llama_cpp import installed as llama_cpp_installed
from ftcore.safetensors_file import indexed_files, read_weights
from ftcore.specs import ModelFamily
from ftcore.templates import names as template_names
from ftcore.templates import read as read_template

FEW, MANY = 150, 2_000
SECONDS = 2.0
TOKENS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xc3(",
        b"{",
        b"}",
        b"[" * 3_000,
        b'{"a":' * 3_000,
        b"]",
        b'"',
        b"'",
        b":",
        b",",
        b"-1",
        b"-",
    ),
    *(
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b"9" * 40,
        b"18446744073709551616",
        b"../../x",
        b"C:\\x",
        b"\\u0000",
        b"\\ud800",
    ),
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!python/name:os.system",
        b"!!binary x",
        b"? ",
        b"- ",
        b"\t",
        b"\r\n",
        b"%YAML 9\n",
        b"---\n",
    ),
    *(
        b"${",
        b"${oc.env:PATH}",
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"{% for x in range(9) %}",
        b"{% endfor %}",
        b"|tojson",
        b"~",
    ),
)


def mutated(data: bytes, chosen: random.Random) -> bytes:
    """The file with one to four changes: bits, lost and repeated parts, an end that is missing, strange words."""
    found = bytearray(data)
    for _ in range(chosen.randint(1, 4)):
        at = chosen.randrange(len(found) + 1)
        length = chosen.choice((1, 1, 2, 8, 64, 999))
        kind = chosen.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << chosen.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            found[at : at + length] = chosen.randbytes(min(length, 8))
        else:
            found[at:at] = chosen.choice(TOKENS)
    return bytes(found)


def survives(data: bytes, read: Callable[[bytes], object], count: int, allowed: int = 3) -> Counter[str]:
    """How many of the mutated files were taken, and how many refused by a typed error; anything else is a failure.

    A busy machine may make a few seem slow.
    """
    chosen, ends, slow = random.Random(8), Counter[str](), 0
    for number in range(count):
        case = mutated(data, chosen)
        began = time.process_time()
        try:
            read(case)
            ends["taken"] += 1
        except FtcoreError as error:
            ends["refused"] += 1
            ends["long"] += not 0 < len(short(str(error))) < 6_000
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}\n{case[:300]!r}") from error
        slow += time.process_time() - began > SECONDS
    assert slow <= allowed
    assert not ends["long"], "what is told fits a terminal"
    assert ends["refused"] > count // 20
    return ends


counts = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@counts
def test_headers_of_safetensors(count: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(4, 8), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.tensor(1)}, whole)
    content = whole.read_bytes()
    head = int.from_bytes(content[:8], "little") + 8
    file = tmp_path / "model.safetensors"

    def read(header: bytes) -> None:
        file.write_bytes(header + content[head:])
        for weight in read_weights(file).values():
            rows = weight.shape[0] if weight.shape else 1
            assert weight.rows(0, rows).numel() <= 10_000

    survives(content[:head], read, count)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}},
        {"a": 7},
        [],
        None,
    ],
)
def test_lying_sizes_in_safetensors(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(Refused, match="damaged"):
        read_weights(file)


@counts
def test_indexes_of_weights(count: int, tmp_path: Path) -> None:
    index = {
        "metadata": {"total_size": 7},
        "weight_map": {f"w{n}": f"model-{n:05d}-of-00003.safetensors" for n in range(3)},
    }
    file = tmp_path / "model.safetensors.index.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        assert all(found.parent == tmp_path for found in indexed_files(file))

    survives(json.dumps(index).encode(), read, count)


@counts
def test_configs_of_checkpoints(count: int, tmp_path: Path) -> None:
    family = ModelFamily(model_types=("llama",), roles=(), lora_targets=(), tiny={})
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "rope_scaling": {"factor": 2.0},
        "text_config": {"vocab_size": 9},
    }

    def read(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        found = checkpoint.read_config(ModelConfig(path=str(tmp_path)), family)
        assert isinstance(found, dict)
        checkpoint.problems(ModelConfig(path=str(tmp_path)), family)

    survives(json.dumps(config).encode(), read, count)


@counts
def test_yaml_of_others(count: int, tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - /model: llama\n  - _self_\ntrainer: &t\n  args: {x: 1}\nmore: *t\n"
    (tmp_path / "recipe").mkdir()

    def read(data: bytes) -> None:
        (tmp_path / "recipe" / "x.yaml").write_bytes(data)
        foreign_yaml.check(str(tmp_path))

    survives(text.encode(), read, count)


@pytest.mark.parametrize("count", [FEW // 3, pytest.param(MANY // 4, marks=pytest.mark.slow)])
def test_recorded_configs(count: int, tmp_path: Path) -> None:
    text = (
        "model:\n  name: llama\n  tiny: true\ntrainer:\n  name: sft\n  max_steps: 2\n  args: {}\n"
        "adapter:\n  name: lora\n"
        "data:\n  name: auto\nkernels:\n  auto:\n    name: auto\ngenerator:\n  name: transformers\nprompts:\n- Hi\n"
    )

    def read(data: bytes) -> None:
        (tmp_path / "config.yaml").write_bytes(data)
        compose([f"run='{tmp_path}'"])

    survives(text.encode(), read, count)


@counts
def test_chat_templates(count: int) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    texts = [read_template(name) for name in ("chatml", "qwen3", "llama3_1", "gptoss") if name in template_names()]

    tokenizer = byte_tokenizer()

    def read(data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        assert isinstance(render(tokenizer, talk), str)

    for text in texts:
        survives(text.encode(), read, count // len(texts))


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp_installed(), reason="llama.cpp is not installed")
def test_gguf_files(tmp_path: Path) -> None:
    """llama.cpp reads them in a process of its own: what it does to a damaged file is a message here."""
    from gguf import GGUFWriter

    whole, file = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    writer = GGUFWriter(whole, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{n}" for n in range(300)])
    writer.add_token_scores([0.0] * 300)
    writer.add_token_types([1] * 300)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        with LlamaCpp(file, vocab_only=True, threads=1) as opened:
            opened.tokens("t1")

    survives(whole.read_bytes(), read, 60)
