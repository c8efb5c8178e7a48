"""Chat templates of the model makers: exactly what the assistant writes is trained, in whatever the rows say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers_of import tokenizer

from ftcore import templates
from ftcore.chat import chat_encoder, render, turn_tokens
from ftcore.control import CUT, MARK
from ftcore.errors import Exit, Refused
from ftcore.specs import Shape
from ftcore.tokens import IGNORED, RowTokenizer

THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

Answer = Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """What a template's tokenizer has, and what an answer becomes."""

    answer: Answer
    """The assistant's words to what it writes, its end included."""
    bos: str | None
    eos: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    system: bool = True
    rewrites: bool = False
    """Earlier answers are written otherwise, so that each is trained in a text of its own."""
    closes: str = ""
    """What stands behind the last answer of a conversation besides."""
    forbids: str = ""
    """What the template itself refuses in an answer."""
    tools: bool = False

    def tokenizer(self, kind: str, name: str) -> Any:
        return tokenizer(kind, templates.read(name), self.bos, self.eos, self.special, self.plain)


def ends(token: str, trim: bool = False) -> Answer:
    return lambda said: (said.strip() if trim else said) + token


def qwen3(said: str) -> str:
    return f"<think>\n\n</think>\n\n{said.lstrip(chr(10))}<|im_end|>"


IM = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_EDGES = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")

FAMILIES = {
    "chatml": Family(ends("<|im_end|>"), None, "<|im_end|>", ("<|im_start|>",)),
    "smollm2": Family(ends("<|im_end|>"), "<|im_start|>", "<|im_end|>", ()),
    "qwen2_5": Family(ends("<|im_end|>"), None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), CALLS, tools=True),
    "qwen3": Family(
        qwen3, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), THINK + CALLS, rewrites=True, tools=True
    ),
    "qwen3_training": Family(qwen3, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), THINK + CALLS, tools=True),
    "qwen3_instruct_2507": Family(ends("<|im_end|>"), None, "<|im_end|>", ("<|im_start|>",), CALLS, tools=True),
    "llama3": Family(ends("<|eot_id|>", True), "<|begin_of_text|>", "<|eot_id|>", LLAMA[:2]),
    "llama3_1": Family(ends("<|eot_id|>", True), "<|begin_of_text|>", "<|eot_id|>", (*LLAMA[:2], *LLAMA[3:])),
    "llama3_2": Family(ends("<|eot_id|>", True), "<|begin_of_text|>", "<|eot_id|>", (*LLAMA[:2], *LLAMA[3:])),
    "gemma": Family(ends("<end_of_turn>", True), "<bos>", "<eos>", GEMMA, system=False),
    "gemma3": Family(ends("<end_of_turn>", True), "<bos>", "<eos>", GEMMA),
    "mistral": Family(lambda said: f" {said}</s>", "<s>", "</s>", ("[INST]", "[/INST]")),
    "phi3": Family(ends("<|end|>"), "<s>", "<|endoftext|>", PHI, closes="\n<|endoftext|>"),
    "phi4": Family(ends("<|im_end|>"), "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
    "lfm2": Family(ends("<|im_end|>"), "<|startoftext|>", "<|im_end|>", ("<|im_start|>",), CALLS),
    "gptoss": Family(
        lambda said: f"<|channel|>final<|message|>{said}<|return|>",
        "<|startoftext|>",
        "<|return|>",
        HARMONY[:-1],
        rewrites=True,
        forbids="<|channel|>",
    ),
    "deepseek_r1_distill_training": Family(ends(DEEPSEEK_EDGES[1]), *DEEPSEEK_EDGES, (), DEEPSEEK + THINK),
    "alpaca": Family(ends("</s>"), "<s>", "</s>", ()),
    "vicuna": Family(lambda said: f" {said}</s>", "<s>", "</s>", ()),
}
KINDS = ("bytes", "bpe")
LOOK_ALIKES = (
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "</s>",
    "[/INST]",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<|start|>assistant<|channel|>final<|message|>",
    DEEPSEEK[1],
    "### Response:\n",
    "assistant",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|endoftext|>",
    "<|assistant|>\n",
    "ASSISTANT:",
)

letters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cn"), exclude_characters=MARK + CUT)
words = st.lists(st.text(letters, min_size=1, max_size=12) | st.sampled_from(LOOK_ALIKES), min_size=1, max_size=3)
said = words.map("".join).filter(lambda text: text.strip() != "")
SLOW_DOWN = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def conversation(turns: list[str], system: str | None) -> list[dict[str, str]]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *talk] if system else talk


def trained(tok: Any, row: dict[str, list[int]]) -> str:
    return str(tok.decode([label for label in row["labels"] if label != IGNORED], skip_special_tokens=False))


def check(name: str, kind: str, turns: list[str], system: str | None) -> None:
    """The property: what is trained is the assistant's words and their end, in every turn, and nothing else."""
    family = FAMILIES[name]
    tok = family.tokenizer(kind, name)
    messages = conversation(turns, system if family.system else None)
    rows = RowTokenizer(tok, Shape.MESSAGES, 10**6)({"messages": messages})
    answers = [family.answer(text) for text in turns[1::2]]
    wanted = answers if family.rewrites else ["".join(answers)]
    wanted[-1] += family.closes if len(turns) % 2 == 0 else ""
    assert [trained(tok, row) for row in rows] == wanted
    control = set(tok.convert_tokens_to_ids(list(chat_encoder(tok).control)))
    for row in rows:
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
        text = tok.decode(row["input_ids"], skip_special_tokens=False)
        upto = (
            messages[: 2 * (rows.index(row) + 1) + (messages[0]["role"] == "system")] if family.rewrites else messages
        )
        assert text == render(tok, upto) or not family.rewrites
        # Every control token is the template's own: the same conversation in harmless words has just as many.
        tame = [{**m, "content": "x"} for m in upto]
        plain = tok(render(tok, tame), add_special_tokens=False)["input_ids"]
        assert [t for t in row["input_ids"] if t in control] == [t for t in plain if t in control]
        if tok.bos_token_id is not None and tok.bos_token_id not in tok.convert_tokens_to_ids(list(IM)):
            assert row["input_ids"].count(tok.bos_token_id) <= 1


def two_of(turns: list[str]) -> list[str]:
    return turns if len(turns) % 2 == 0 else turns[:-1]


@pytest.mark.few
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_hundred_conversations(name: str, kind: str) -> None:
    @settings(max_examples=50, deadline=None, suppress_health_check=SLOW_DOWN, derandomize=True)
    @given(turns=st.lists(said, min_size=2, max_size=6), system=st.none() | said)
    def holds(turns: list[str], system: str | None) -> None:
        assume(not (forbidden := FAMILIES[name].forbids) or not any(forbidden in turn for turn in turns))
        check(name, kind, two_of(turns), system)

    holds()


def is_prefix(tokenize: RowTokenizer, turns: list[str], family: Family) -> None:
    """A conversation's tokens, up to the end of its last answer, are the first of those of one that goes on."""
    tok = tokenize.tokenizer
    whole = tokenize({"messages": conversation(turns, None)})
    for count in range(2, len(turns), 2):
        part = tokenize({"messages": conversation(turns[:count], None)})[-1]
        closing = len(tok(family.closes, add_special_tokens=False)["input_ids"]) if family.closes else 0
        trained = [place for place, label in enumerate(part["labels"]) if label != IGNORED]
        ids = part["input_ids"][: trained[-1] + 1 - closing]
        # Where earlier answers are written otherwise, each has a text of its own, which is the conversation up to it.
        longer = whole[count // 2 - 1] if family.rewrites else whole[-1]
        assert longer["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_begins_a_longer_one(name: str) -> None:
    tokenize = RowTokenizer(FAMILIES[name].tokenizer("bpe", name), Shape.MESSAGES, 10**6)

    @settings(max_examples=8, deadline=None, suppress_health_check=SLOW_DOWN, derandomize=True)
    @given(turns=st.lists(said, min_size=4, max_size=6))
    def holds(turns: list[str]) -> None:
        assume(not (forbidden := FAMILIES[name].forbids) or not any(forbidden in turn for turn in turns))
        is_prefix(tokenize, two_of(turns), FAMILIES[name])

    holds()


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The one tokenizer of a real checkpoint that needs no download."""
    from ftcore import hooks as h
    from ftcore import pipeline
    from ftcore.composition import compose, typed

    hooks, plan = pipeline.prepare(typed(compose(["+model=smollm2", "+trainer=sft"])))
    return hooks.first(h.ftcore_load_tokenizer, plan=plan)


@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_real_tokenizer(count: int, smollm2: Any) -> None:
    family = Family(ends("<|im_end|>"), "<|im_start|>", "<|im_end|>", ())
    tokenize = RowTokenizer(smollm2, Shape.MESSAGES, 10**6)

    def written(text: str) -> bool:  # SmolLM2's vocabulary lacks some bytes, such as that of U+001D
        ids = smollm2(text, add_special_tokens=False)["input_ids"]
        return bool(smollm2.decode(ids, skip_special_tokens=False) == text)

    @settings(max_examples=count, deadline=None, suppress_health_check=SLOW_DOWN, derandomize=count < 1000)
    @given(turns=st.lists(said.filter(written), min_size=2, max_size=6))
    def holds(turns: list[str]) -> None:
        (row,) = tokenize({"messages": conversation(two_of(turns), "Be kind.")})
        assert trained(smollm2, row) == "".join(map(family.answer, two_of(turns)[1::2]))
        is_prefix(tokenize, two_of(turns), family)

    holds()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_fits_the_tokenizer_that_it_was_made_for(name: str) -> None:
    """The checks of tokenizer and template find nothing in what the model makers bring."""
    from ftcore.template_facts import Probe, marks_astray, split_words

    family = FAMILIES[name]
    tok = family.tokenizer("bpe", name)
    probe = Probe.of(tok)
    assert probe.rewrites is family.rewrites
    assert list(split_words(tok, probe)) == []
    assert marks_astray(tok, probe) is None
    assert probe.ids[:2] != [tok.bos_token_id] * 2
    assert probe.end == (family.closes.strip() or family.answer("x").removeprefix("x").split("x")[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_thousand_conversations(name: str, kind: str) -> None:
    @settings(max_examples=1000, deadline=None, suppress_health_check=SLOW_DOWN)
    @given(turns=st.lists(said, min_size=2, max_size=6), system=st.none() | said)
    def holds(turns: list[str], system: str | None) -> None:
        assume(not (forbidden := FAMILIES[name].forbids) or not any(forbidden in turn for turn in turns))
        check(name, kind, two_of(turns), system)

    holds()


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_asks_otherwise_than_it_answers_is_refused(name: str) -> None:
    """Its prompt opens with <think>, its written answers do not: a model would be trained on what it never sees."""
    tok = tokenizer("bpe", templates.read(name), *DEEPSEEK_EDGES, (), DEEPSEEK + THINK)
    with pytest.raises(Refused, match="asks for an answer with '<think>") as refused:
        RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": TALK})
    assert refused.value.code == Exit.DATA
    assert "data.template" in str(refused.value)


def test_marks_of_a_template_are_taken_where_its_prompt_is_another() -> None:
    """`{% generation %}` says what the assistant writes; the header before it is the template's."""
    family = FAMILIES["deepseek_r1_distill_training"]
    tok = family.tokenizer("bpe", "deepseek_r1_distill_training")
    row = {"messages": [*TALK, *TALK]}
    (made,) = RowTokenizer(tok, Shape.MESSAGES, 1000)(row)
    assert trained(tok, made) == f"Hello.{family.eos}Hello.{family.eos}"
    with pytest.raises(Refused, match="not certain"):  # the marks know nothing of single answers
        RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [*TALK, TALK[0], {**TALK[1], "weight": 0}]})


def test_thoughts_are_trained_where_the_template_writes_them() -> None:
    tok = FAMILIES["qwen3"].tokenizer("bpe", "qwen3")
    for answer in (
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"},
        {"role": "assistant", "reasoning_content": "Two.", "content": "4"},
        {"role": "assistant", "thinking": "Two.", "content": "4"},
    ):
        rows = RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [*TALK, TALK[0], answer]})
        assert [trained(tok, row) for row in rows] == [qwen3("Hello."), "<think>\nTwo.\n</think>\n\n4<|im_end|>"]
        think = tok.convert_tokens_to_ids("<think>")
        assert rows[1]["labels"].count(think) == 1, "the token, not its letters"
    plain = FAMILIES["llama3"].tokenizer("bpe", "llama3")
    with pytest.raises(Refused, match="leaves out the thoughts of turn 2"):
        RowTokenizer(plain, Shape.MESSAGES, 1000)({"messages": [TALK[0], {**TALK[1], "reasoning_content": "Two."}]})


def test_words_that_a_template_would_drop_are_refused() -> None:
    """QwQ's template keeps only what follows </think>: the reasoning would silently not be trained."""
    drops = templates.read("chatml").replace("message['content']", "message['content'].split('</think>')[-1]")
    tok = tokenizer("bpe", drops, None, "<|im_end|>", ("<|im_start|>",), THINK)
    with pytest.raises(Refused, match="leaves out the words of turn 2"):
        RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [TALK[0], {**TALK[1], "content": "<think>a</think>b"}]})
    silent = templates.read("chatml").replace(
        "for message in messages", "for message in messages if message['role'] != 'system'"
    )
    tok = tokenizer("bpe", silent, None, "<|im_end|>", ("<|im_start|>",))
    with pytest.raises(Refused, match=r"leaves out words of message 1 \(system\)"):
        RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [{"role": "system", "content": "Be kind."}, *TALK]})


FUNCTION = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
STEPS = [TALK[0], CALL, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_calls_and_answers_are_trained_and_what_tools_say_is_not(name: str) -> None:
    family = FAMILIES[name]
    tok = family.tokenizer("bpe", name)
    rows = RowTokenizer(tok, Shape.MESSAGES, 10_000)({"messages": STEPS, "tools": [FUNCTION]})
    call = family.answer('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>')
    answers = [call, family.answer("It is 4.")]
    assert [trained(tok, row) for row in rows] == (answers if family.rewrites else ["".join(answers)])
    assert all("<tool_response>\n4" in tok.decode(row["input_ids"]) for row in rows[-1:])


def test_a_template_without_tools_is_refused() -> None:
    tok = FAMILIES["llama3"].tokenizer("bpe", "llama3")
    with pytest.raises(Refused, match="leaves out the tools"):
        RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": TALK, "tools": [FUNCTION]})


def test_an_answer_of_weight_0_is_read_only() -> None:
    tok = FAMILIES["chatml"].tokenizer("bpe", "chatml")
    row = {"messages": [TALK[0], {"role": "assistant", "content": "Wrong.", "weight": 0}, *TALK]}
    assert [trained(tok, made) for made in RowTokenizer(tok, Shape.MESSAGES, 1000)(row)] == ["Hello.<|im_end|>"]


def test_completions_as_messages_train_only_the_completion() -> None:
    tok = FAMILIES["chatml"].tokenizer("bpe", "chatml")
    row = {"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]}
    (made,) = RowTokenizer(tok, Shape.PROMPT_COMPLETION, 1000)(row)
    assert trained(tok, made) == "Hello.<|im_end|>"
    assert tok.decode(made["input_ids"]).count("Hello.") == 2


def test_a_template_without_an_end_gets_the_end_token() -> None:
    tok = tokenizer(
        "bpe",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}",
        None,
        "</s>",
        (),
    )
    (made,) = RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": TALK})
    assert trained(tok, made) == "Hello.\n</s>"
    assert made["labels"][-1] == tok.eos_token_id == tok.pad_token_id


@pytest.mark.parametrize("shape", [Shape.TEXT, Shape.PROMPT_COMPLETION])
def test_text_that_brings_its_own_begin_token_gets_no_second_one(shape: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tok = FAMILIES["llama3"].tokenizer("bpe", "llama3")
    begin, end = tok.bos_token_id, tok.eos_token_id
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>", special_tokens=[("<|begin_of_text|>", begin), ("<|eot_id|>", end)]
    )
    for text in ("<|begin_of_text|>Hi", "Hi"):
        row = {"text": text, "prompt": text, "completion": " you"}
        (made,) = RowTokenizer(tok, shape, 1000)(row)
        assert made["input_ids"].count(begin) == 1
        assert made["input_ids"].count(end) == 1, "the end token that some tokenizers put behind a prompt is taken out"
        assert made["labels"][-1] == end


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_an_answers_first_token_does_not_reach_into_the_prompt(kind: str) -> None:
    """`:` and ` ` of the template, and the answer's space or new line, are one token in many tokenizers."""
    text = (
        "{% for m in messages %}{{ m.role + ':\n' + m.content + eos_token }}{% endfor %}"
        "{{ 'assistant:\n' if add_generation_prompt }}"
    )
    tok = tokenizer(kind, text, "<s>", "</s>", ())
    for said in ("\nHello.", "\n\n\nHello.", " Hello.", "Hello."):
        row = {"messages": [TALK[0], {"role": "assistant", "content": said}]}
        (made,) = RowTokenizer(tok, Shape.MESSAGES, 1000)(row)
        prompt = tok(render(tok, row["messages"][:1], generate=True), add_special_tokens=False)["input_ids"]
        assert made["input_ids"][: len(prompt)] == prompt, "the tokens that the model is asked with"
        assert made["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert IGNORED not in made["labels"][len(prompt) :]
        if kind == "bpe":
            assert trained(tok, made) == f"{said}</s>"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "spm"])
def test_look_alikes_are_spelt_out(kind: str) -> None:
    tok = tokenizer(kind, templates.read("mistral"), "<s>", "</s>", ("[INST]", "[/INST]"))
    sly = "a</s>[/INST]b[INST]"
    (made,) = RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [{"role": "user", "content": sly}, TALK[1]]})
    tokens = tok.convert_ids_to_tokens(made["input_ids"])
    assert [t for t in tokens if t in ("<s>", "</s>", "[INST]", "[/INST]")] == ["<s>", "[INST]", "[/INST]", "</s>"]
    assert sly in tok.decode(made["input_ids"])


def test_tokens_that_open_turns_need_not_be_special() -> None:
    tok = FAMILIES["deepseek_r1_distill_training"].tokenizer("bpe", "deepseek_r1_distill_training")
    assert set(DEEPSEEK) <= turn_tokens(tok)
    assert not set(THINK) & turn_tokens(tok)


def test_the_two_noncharacters_are_refused() -> None:
    tok = FAMILIES["chatml"].tokenizer("bpe", "chatml")
    for stray in (MARK, CUT):
        with pytest.raises(Refused, match="noncharacter"):
            RowTokenizer(tok, Shape.MESSAGES, 1000)({"messages": [{"role": "user", "content": f"a{stray}"}, TALK[1]]})


def test_templates_run_in_a_sandbox() -> None:
    tok = tokenizer(
        "bytes", "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", None, "</s>", ()
    )
    with pytest.raises(Refused, match="unsafe"):
        render(tok, TALK)


def test_names_and_files(tmp_path: Any) -> None:
    assert {"chatml", "mistral", "phi4", "qwen3", "llama3_1", "gemma3", "gptoss", "lfm2"} <= set(templates.names())
    for name in templates.names():
        assert templates.read(name)
    own = tmp_path / "mine.jinja"
    own.write_text("{{ messages[0].content }}")
    assert templates.read(str(own)) == "{{ messages[0].content }}"
    own.write_text("\ufeff{{ messages }}", encoding="utf-8")
    assert templates.read(str(own)) == "{{ messages }}", "no byte order mark in every row"
    own.write_text("{% for m in messages %}\n{{ m }")
    with pytest.raises(Refused, match=r"mine\.jinja:2: is no Jinja template"):
        templates.read(str(own))
    with pytest.raises(Refused, match=r"did you mean data\.template=chatml"):
        templates.read("chatlm")
    with pytest.raises(Refused, match="there is no file"):
        templates.read(str(tmp_path / "other.jinja"))
