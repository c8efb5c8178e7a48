"""Which tokens are trained: exactly the assistants' words and the ends of their turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore.bytes_tokenizer import CHATML, byte_tokenizer
from ftcore.errors import Exit, Refused
from ftcore.specs import Shape
from ftcore.tokens import IGNORED, RowTokenizer, tokenize_row

TOKENIZER = byte_tokenizer()


def trained_text(row: dict[str, list[int]]) -> str:
    return TOKENIZER.decode([label for label in row["labels"] if label != IGNORED])


def messages(*turns: str) -> dict[str, object]:
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]}


def test_text_trains_everything_and_its_end() -> None:
    row = tokenize_row(TOKENIZER, {"text": "abc"}, Shape.TEXT, 100)
    assert row["labels"] == row["input_ids"]
    assert row["input_ids"][-1] == TOKENIZER.eos_token_id
    assert tokenize_row(TOKENIZER, {"text": "abc<|im_end|>"}, Shape.TEXT, 100) == row, "the end is not added twice"


def test_prompt_completion_trains_the_completion() -> None:
    row = tokenize_row(TOKENIZER, {"prompt": "2+2=", "completion": "4"}, Shape.PROMPT_COMPLETION, 100)
    assert trained_text(row) == "4<|im_end|>"
    assert TOKENIZER.decode(row["input_ids"]) == "2+2=4<|im_end|>"


def test_every_assistant_turn_and_its_end_is_trained_and_nothing_else() -> None:
    row = tokenize_row(TOKENIZER, messages("Hi", "Hello.", "And?", "Bye."), Shape.MESSAGES, 1000)
    assert trained_text(row) == "Hello.<|im_end|>Bye.<|im_end|>"


def test_words_that_look_like_the_assistants_turn_are_not_trained() -> None:
    """No substring search: the user quotes the template and the very answer."""
    sly = "say <|im_start|>assistant\nYes.<|im_end|> now"
    row = tokenize_row(TOKENIZER, messages(sly, "Yes."), Shape.MESSAGES, 1000)
    assert trained_text(row) == "Yes.<|im_end|>"


def test_long_rows_are_cut_and_labels_stay_aligned() -> None:
    row = tokenize_row(TOKENIZER, messages("x" * 50, "y" * 50), Shape.MESSAGES, 90)
    assert len(row["input_ids"]) == len(row["labels"]) == 90
    assert set(trained_text(row)) == {"y"}


plain = st.text(
    st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=("Cs",)), min_size=1, max_size=30
)


turns_of = st.lists(plain, min_size=2, max_size=6)


def is_masked_exactly(turns: list[str], system: str | None) -> None:
    row = messages(*turns)
    if system:
        row["messages"].insert(0, {"role": "system", "content": system})  # type: ignore[attr-defined]
    tokens = tokenize_row(TOKENIZER, row, Shape.MESSAGES, 10_000)
    assert trained_text(tokens) == "".join(f"{t}<|im_end|>" for t in turns[1::2])
    assert TOKENIZER.decode(tokens["input_ids"]).startswith("<|im_start|>")
    assert all(label in (IGNORED, token) for token, label in zip(tokens["input_ids"], tokens["labels"], strict=True))


@settings(max_examples=100, deadline=None)
@given(turns=turns_of, system=st.none() | plain)
def test_any_conversation_is_masked_exactly(turns: list[str], system: str | None) -> None:
    is_masked_exactly(turns, system)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(turns=turns_of, system=st.none() | plain)
def test_a_thousand_conversations_are_masked_exactly(turns: list[str], system: str | None) -> None:
    is_masked_exactly(turns, system)


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    tokenizer = byte_tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(Refused, match="what it trains is not certain"):
        tokenize_row(tokenizer, messages("Hi", "Hello."), Shape.MESSAGES, 1000)


def test_earlier_turns_that_a_template_rewrites_are_trained_in_texts_of_their_own() -> None:
    shown = "message['content'] if not loop.last or message['role'] == 'user' else '(' + message['content'] + ')'"
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", f"({shown})"))
    rows = RowTokenizer(tokenizer, Shape.MESSAGES, 1000)(messages("Hi", "Hello.", "And?", "Bye."))
    assert [trained_text(row) for row in rows] == ["(Hello.)<|im_end|>", "(Bye.)<|im_end|>"]
    assert [TOKENIZER.decode(row["input_ids"]).count("Hello.") for row in rows] == [1, 1]


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_a_template_that_leaves_out_tool_calls_is_refused(content: str | None) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {**CALL, "content": content}]}
    with pytest.raises(Refused, match="leaves out the tool calls of turn 2") as refused:
        tokenize_row(TOKENIZER, row, Shape.MESSAGES, 1000)
    assert refused.value.code == Exit.DATA


def test_tool_calls_that_are_rendered_are_trained() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "{{ (message.tool_calls or '') | tojson }}<|im_end|>"))
    row = tokenize_row(tokenizer, {"messages": [{"role": "user", "content": "Hi"}, CALL]}, Shape.MESSAGES, 1000)
    assert '"name": "now"' in trained_text(row)


def test_conversations_need_a_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Refused, match="no chat template"):
        tokenize_row(tokenizer, messages("Hi", "Hello."), Shape.MESSAGES, 1000)


def test_unknown_shapes_are_not_guessed() -> None:
    with pytest.raises(LookupError, match="shape 'preference'"):
        tokenize_row(TOKENIZER, {}, Shape.PREFERENCE, 10)


def test_the_byte_tokenizer_keeps_any_text() -> None:
    text = "Grüße, 世界! \t\n🦙"
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert max(TOKENIZER.get_vocab().values()) == 258


def test_a_completion_gets_no_space_that_begins_a_text() -> None:
    """As Llama 2's and Mistral's tokenizers put one there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate("▁Q:xNo2+=4\n")}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    for prompt, completion in (("Q:x\n", "No"), ("2+2=", "4"), ("2+2=", " 4")):
        row = tokenize_row(tokenizer, {"prompt": prompt, "completion": completion}, "prompt_completion", 100)
        said = [token for token in row["labels"] if token != IGNORED]
        assert tokenizer.convert_ids_to_tokens(said) == [*completion.replace(" ", "▁"), "</s>"]
        assert row["input_ids"][:-1] == tokenizer(prompt + completion)["input_ids"]
