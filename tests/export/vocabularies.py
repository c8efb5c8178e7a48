"""Small tokenizers of every kind that GGUF knows, texts to try them on, and files with nothing but a vocabulary."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAMPLE = """
Hello world don't I'm WE'LL they've 3.14 12345 1,000,000 0x7F def foo(x): return x**2 #c if a>=b&&c!=d: {[()]} <b>hi</b>
https://a.b/c?d=e&f http naïve café Zürich Привет мир Ελλάδα こんにちは世界 東京都 한국어 مرحبا שלום ไทย 🙂 👩‍👩‍👧 🇩🇪
½ ² Ⅳ “quotes” — … € £ ¿qué? straße camelCase SNAKE_CASE 're 'S !!! ... -- == ** ()
"""
WORDS = SAMPLE.split()
MARKS = ["हिन्दी", "e\u0301a", "ÀÉÎ", "ЖЁлто", "ǅ", "~~~", "~/x"]
"""What some of llama.cpp's pre-tokenizers split in other places than the expressions that they stand for."""
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", " \n", "\r\n", "    ", "\u00a0", "\u3000", ""]
FIXED = [
    "",
    "a",
    " a",
    "a ",
    "  a",
    " ",
    "\n",
    "\n\n\n",
    "\t\t",
    "123456 7",
    "'s 'S 'll",
    " \n \n x",
    "x\n",
    "日",
    "🙂🙂",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(count: int, special: tuple[str, ...] = (), marks: bool = True) -> list[str]:
    """Words of many scripts, numbers, code, runs of spaces and signs, with special tokens among them."""
    draw = random.Random(0)
    pool = [*WORDS, *(MARKS if marks else ()), *special, *special]
    made = list(FIXED)
    for _ in range(count):
        words = [draw.choice(pool) + draw.choice(SPACES) for _ in range(draw.randint(1, 14))]
        made.append(draw.choice(["", "", " ", "\n"]) + "".join(words))
    return made


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns, half of them with a system message."""
    draw, said = random.Random(1), texts(6 * count, marks=True)[len(FIXED) :]
    made = []
    for i in range(count):
        system = [{"role": "system", "content": said.pop().strip()}] if i % 2 else []
        turns = [
            {"role": role, "content": said.pop()} for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")
        ]
        made.append([*system, *turns])
    return made


@cache
def byte_level(steps: tuple[str, ...], ignore_merges: bool = False) -> str:
    """`tokenizer.json` of a byte-level BPE tokenizer that splits text by these steps, trained on the words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    parts: list[Any] = []
    for step in steps:
        if step == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "gpt2":
            parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in steps))
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts(500), trainers.BpeTrainer(vocab_size=1500, initial_alphabet=sorted(alphabet)))
    return str(made.to_str())


@cache
def spaced(kind: str) -> str:
    """`tokenizer.json` of BPE with byte fallback, its merges made of scores as transformers makes SentencePiece's.

    :param kind: how spaces are treated: `prepend` and `replace` by a normalizer, else `first`, `always` or `never`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", *BYTES]
    made.train_from_iterator(
        texts(500), trainers.BpeTrainer(vocab_size=1800, special_tokens=special, limit_alphabet=120)
    )
    replaced = normalizers.Replace(" ", "▁")
    if kind in ("prepend", "replace"):
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if kind == "prepend" else replaced
        made.pre_tokenizer = None if kind == "prepend" else pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend = json.loads(made.to_str())
    model, order = backend["model"], {}
    for left, right in model["merges"]:
        order.setdefault(left + right, len(order))
    vocab = model["vocab"]
    ways = [(w[:i], w[i:]) for w in order for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    model["merges"] = sorted(ways, key=lambda way: (order["".join(way)], vocab[way[0]], vocab[way[1]]))
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] == "<unk>"]
    return json.dumps(backend)


def tokenizer(backend: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = (), **names: Any) -> Any:
    """A fast tokenizer of transformers, with further special tokens, and added ones that are not special."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(backend)
    inner.add_special_tokens(list(special))
    inner.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)


def vocabulary_file(made: Any, file: Path, rows: int = 0, name: str = "tiny") -> Path:
    """A GGUF file with the tokenizer and no tensors, which llama.cpp opens with `vocab_only`."""
    import gguf

    from ftcore.gguf_facts import Gguf
    from ftcore_exporters.gguf.vocabulary import add_vocabulary

    config = SimpleNamespace(vocab_size=rows or len(made))
    config.get_text_config = lambda: config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    for add in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{add}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer, made, config, Gguf(arch="llama"))  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file
