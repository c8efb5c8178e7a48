"""Which format each fixture file is: one, or a question that names the candidates; never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcore.catalog import installed
from ftcore.errors import Exit, Refused
from ftcore.manager import import_function
from ftcore.media import missing, resolved
from ftcore.rows import iter_rows, local_files
from ftcore.testing.data import COLUMNS
from ftcore_data.auto import FORMATS, Config, ftcore_data_format

FIXTURES = Path(__file__).parent / "fixtures"

EXPECTED = {
    "alpaca.csv": "alpaca",
    "alpaca.json": "alpaca",
    "alpaca.jsonl": "alpaca",
    "alpaca.parquet": "alpaca",
    "alpaca.tsv": "alpaca",
    "alpaca_history.jsonl": "alpaca",
    "ask_nli.jsonl": ("labels", "pairs"),
    "ask_prompt_response.jsonl": ("prompt_completion", "prompts"),
    "ask_question_answer.jsonl": ("prompt_completion", "prompts"),
    "ask_text_prompt.jsonl": ("prompts", "text"),
    "audio.csv": "audio",
    "audio.jsonl": "audio",
    "audio_speaker.jsonl": "audio",
    "codes.jsonl": "codes",
    "codes_layers.jsonl": "codes",
    "codes_list.jsonl": "codes",
    "codes_placed.json": "codes",
    "conversations_role.jsonl": "messages",
    "dolly.jsonl": "alpaca",
    "folder": "text",
    "images.jsonl": "images",
    "images.parquet": "images",
    "images_llava.json": "images",
    "images_parts.jsonl": "images",
    "input_output.csv": "prompt_completion",
    "labels.csv": "labels",
    "labels.jsonl": "labels",
    "labels_many.jsonl": "labels",
    "messages.json": "messages",
    "messages.jsonl": "messages",
    "messages.parquet": "messages",
    "messages_in_data.json": "messages",
    "messages_lines.json": "messages",
    "messages_meta.jsonl": "messages",
    "messages_openai.jsonl": "messages",
    "messages_parts.jsonl": "messages",
    "messages_thinking.jsonl": "messages",
    "pairs.jsonl": "pairs",
    "pairs_query.jsonl": "pairs",
    "pairs_score.csv": "pairs",
    "pairs_triplets.jsonl": "pairs",
    "preference.jsonl": "preference",
    "preference_alpaca.jsonl": "preference",
    "preference_implicit.jsonl": "preference",
    "preference_messages.jsonl": "preference",
    "preference_orca.jsonl": "preference",
    "preference_sharegpt.json": "preference",
    "preference_texts.jsonl": "preference",
    "preference_ultrafeedback.jsonl": "preference",
    "prompt_completion.csv": "prompt_completion",
    "prompt_completion.jsonl": "prompt_completion",
    "prompt_completion_messages.jsonl": "prompt_completion",
    "prompts.jsonl": "prompts",
    "prompts_answer.jsonl": "prompts",
    "questions.csv": "prompts",
    "sharegpt.json": "sharegpt",
    "sharegpt.jsonl": "sharegpt",
    "sharegpt_key.jsonl": "sharegpt",
    "sharegpt_system.jsonl": "sharegpt",
    "sharegpt_tools.jsonl": "sharegpt",
    "stepwise.jsonl": "stepwise",
    "text.csv": "text",
    "text.jsonl": "text",
    "text.txt": "text",
    "tokens.jsonl": "tokens",
    "tokens.parquet": "tokens",
    "tools.jsonl": "tools",
    "tools_some.jsonl": "messages",
    "tools_text.jsonl": "tools",
    "unpaired.csv": "unpaired",
    "unpaired.jsonl": "unpaired",
    "unpaired_messages.json": "unpaired",
}
"""File (or folder) to its format, or to what the question names."""


def test_the_table_is_whole_and_asks_rarely() -> None:
    files = {p.name for p in FIXTURES.iterdir() if p.name != "media"}
    assert files == set(EXPECTED)
    assert len(EXPECTED) >= 40
    assert sum(not isinstance(expected, str) for expected in EXPECTED.values()) <= 6
    assert {e for e in EXPECTED.values() if isinstance(e, str)} == set(FORMATS)
    assert {"auto", *FORMATS} <= set(installed().names("data"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_detection(name: str) -> None:
    expected = EXPECTED[name]
    if isinstance(expected, str):
        assert ftcore_data_format(Config(path=str(FIXTURES / name))).name == expected
        return
    with pytest.raises(Refused) as refused:
        ftcore_data_format(Config(path=str(FIXTURES / name)))
    problem = refused.value.problems[0]
    assert f"could be {' or '.join(expected)}" in problem.message
    assert problem.fix == f"say {' or '.join(f'data={one}' for one in expected)}"
    assert problem.code == Exit.DATA
    for one in expected:
        named = ftcore_data_format(Config(path=str(FIXTURES / name), format=one))
        assert named.name == one


@pytest.mark.parametrize("name", sorted(name for name, expected in EXPECTED.items() if isinstance(expected, str)))
def test_every_row_is_checked_and_converted(name: str) -> None:
    form = ftcore_data_format(Config(path=str(FIXTURES / name)))
    check, convert = import_function(form.check, "data"), import_function(form.convert, "data")
    files = local_files(str(FIXTURES / name))
    assert files
    for file in files:
        for place, row in iter_rows(file):
            assert check(row) is None, place
            assert missing(row, form.media, file.parent) is None, place
            made = convert(resolved(row, form.media, file.parent))
            wanted = COLUMNS[form.shape] if form.shape != "pairs" else {"anchor"} & set(made) or {"score"}
            assert wanted <= set(made), place
            assert None not in made.values(), place
