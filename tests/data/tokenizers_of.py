"""Small tokenizers of the kinds in use, with the control tokens of a chat template: no download."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

CORPUS = [
    Path(__file__).read_text(encoding="utf-8"),
    "user assistant system model Hello there. How are you?\n\n I am fine, thank you.\n  And you? \n",
    "The assistant says: yes, no, one two three. 123 456 ... !!! ??? \t\t \n\n\n",
]


@cache
def backend(kind: str) -> str:
    """`bytes`: one token a byte; `bpe`: byte-level BPE with merges, as GPT-2; `spm`: Metaspace with byte fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    else:
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        made = Tokenizer(models.BPE(byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=bytes_, max_token_length=8))
    return str(made.to_str())


def tokenizer(
    kind: str, template: str, bos: str | None, eos: str, others: tuple[str, ...], plain: tuple[str, ...] = ()
) -> Any:
    """A tokenizer whose padding is its end token; `plain` are added tokens that are not special, as `<think>` is."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(backend(kind))
    inner.add_special_tokens([*filter(None, [bos]), eos, *others])
    inner.add_tokens([AddedToken(token, normalized=False) for token in plain])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=eos, clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made
