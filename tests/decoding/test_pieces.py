"""Text of token ids that come one by one: no half character, nothing taken back, and nothing lost."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.pieces import INCOMPLETE, Pieces, decoded

TEXTS = {
    "words": "Forge here. A rainbow, it's said, has 7 colours!  Try this:\n\n    x = 1\n    y = 2\n- done",
    "emoji": "Sure \U0001f600\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea! Done \u2764\ufe0f.",
    "Chinese": "你好，世界。这是一个测试，没有空格。",
    "mixed": "Tokyo は東京です (とうきょう) \U0001f5fc and 서울 is 서울.",
    "Thai": "สวัสดีชาวโลก",
    "accents": "Ça va très bien, à bientôt… naïve café — “ok”",
    "a replacement character of its own": "left \ufffd right",
    "blanks around it": "\n\n  hello there \n ",
    "nothing": "",
}


@cache
def tokenizer_of(kind: str) -> Any:
    """Of bytes; or of words with bytes for what is none of them, as SentencePiece's models have it."""
    if kind == "bytes":
        return byte_tokenizer()
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    known = ["<unk>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=known, initial_alphabet=list("▁abcdefghijklmnop"))
    inner.train_from_iterator(["forge here a rainbow is done hello there over there"] * 9, trainer)
    plain = Tokenizer.from_str(inner.to_str().replace('"special":true', '"special":false'))
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["bytes", "words and bytes"])
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_text(kind: str, name: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"]
    whole = decoded(tokenizer, ids).strip()
    assert whole == TEXTS[name].strip()
    drawn = random.Random(0)
    for longest in (1, 1, 2, 3, 8, 1000):
        pieces, said, at = Pieces(tokenizer), [], 0
        while at < len(ids):
            to = at + drawn.randint(1, longest)
            said.append(pieces.add(ids[at:to]))
            assert whole.startswith("".join(said)), "what was handed out stays"
            at = to
        said.append(pieces.end())
        assert "".join(said) == whole
        if name != "a replacement character of its own":
            assert not any(INCOMPLETE in piece for piece in said)


def test_words_come_whole_and_other_scripts_letter_by_letter() -> None:
    tokenizer = byte_tokenizer()
    for text, expected in {"Hi you all": ["Hi", " you", " all"], "你好吗": ["你", "好", "吗"]}.items():
        pieces = Pieces(tokenizer)
        said = [pieces.add([one]) for one in tokenizer(text)["input_ids"]]
        assert [piece for piece in [*said, pieces.end()] if piece] == expected


@pytest.mark.parametrize("kind", ["bytes", "words and bytes"])
def test_a_character_that_is_cut_off_is_left_out(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("ok \U0001f600", add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)
    assert "".join([*(pieces.add([one]) for one in ids[:-1]), pieces.end()]) == "ok"


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    tokenizer = byte_tokenizer()
    before, after = (tokenizer(text)["input_ids"] for text in ("one ", " two three"))
    bad = tokenizer.convert_tokens_to_ids([tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"][0])] * 3)
    pieces = Pieces(tokenizer)
    said = "".join([*(pieces.add([one]) for one in [*before, *bad, *after]), pieces.end()])
    assert said == "one \ufffd\ufffd\ufffd two three"


def test_special_tokens_are_not_shown() -> None:
    tokenizer = byte_tokenizer()
    pieces = Pieces(tokenizer)
    ids = [*tokenizer("Done")["input_ids"], tokenizer.eos_token_id]
    assert "".join([*(pieces.add([one]) for one in ids), pieces.end()]) == "Done"


def test_a_secret_is_handed_out_whole() -> None:
    """It is hidden by what is printed to, which knows it by its form."""
    from ftcore.redaction import HIDDEN, redact

    tokenizer, secret = byte_tokenizer(), "hf_" + "abcdEFGH1234" * 2
    pieces = Pieces(tokenizer)
    said = [pieces.add([one]) for one in tokenizer(f"The token is {secret} and no other")["input_ids"]]
    shown = "".join(redact(piece) for piece in [*said, pieces.end()])
    assert shown == f"The token is {HIDDEN} and no other"
