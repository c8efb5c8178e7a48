"""What a data format keeps to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ftcore.config import TrainerConfig
from ftcore.manager import import_function
from ftcore.rows import iter_rows
from ftcore.specs import DataFormat, Shape, TrainerSpec
from ftcore.testing import runs
from ftcore.testing.plugin import PluginContract
from ftcore.tokens import TOKENIZED

COLUMNS = {
    Shape.TEXT: {"text"},
    Shape.MESSAGES: {"messages"},
    Shape.PROMPT_COMPLETION: {"prompt", "completion"},
    Shape.PROMPTS: {"prompt"},
    Shape.PREFERENCE: {"chosen", "rejected"},
    Shape.UNPAIRED: {"prompt", "completion", "label"},
    Shape.STEPWISE: {"prompt", "completions", "labels"},
    Shape.IMAGES: {"images", "messages"},
    Shape.AUDIO: {"audio", "text"},
    Shape.CODES: {"codes", "text"},
    Shape.LABELS: {"text", "label"},
    Shape.PAIRS: {"anchor", "positive"},
    Shape.TOKENS: {"input_ids", "labels"},
}
"""Shape to the columns that a converted row has at least."""

Row = Mapping[str, Any]


class DataContract(PluginContract):
    """A format ships rows that pass its own check, converts them to the columns of its shape, and refuses bad ones."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select a model, whose tokenizer the rows are tried with."""
    columns: ClassVar[frozenset[str]] = frozenset()
    """Columns of a converted row, for a shape of your own."""
    bad_rows: ClassVar[Sequence[Row]] = ()
    """Further rows that the check must refuse."""

    def format(self) -> DataFormat:
        """What the plugin says of itself."""
        form = runs.prepared([*self.base, *self.selected()])[1].format
        assert form is not None
        return form

    def rows(self) -> list[Row]:
        """All shipped rows."""
        files = [self.format().sample, *filter(None, [self.format().sample_eval])]
        return [row for file in files for _, row in iter_rows(Path(file))]

    def check(self) -> Callable[[Row], str | None]:
        """The format's check."""
        return import_function(self.format().check, "data")

    def test_sample_rows_pass_the_check(self) -> None:
        """Each shipped row is a good one, and the check leaves it as it is."""
        rows, check = self.rows(), self.check()
        assert len(rows) >= 3
        kept = copy.deepcopy(rows)
        assert [reason for row in rows if (reason := check(row))] == []
        assert rows == kept

    def test_rows_convert_to_the_columns_of_the_shape(self) -> None:
        """A converted row has its shape's columns with words in them, also with the nulls that `datasets` adds."""
        form = self.format()
        convert = import_function(form.convert, "data")
        wanted = self.columns or COLUMNS[form.shape]
        keys = {key for row in self.rows() for key in row}
        for row in self.rows():
            kept = copy.deepcopy(row)
            full = {**dict.fromkeys(keys), **row}
            converted = convert(full)
            assert wanted <= set(converted)
            assert all(converted[column] or converted[column] is False for column in wanted)
            assert row == kept, "convert changes the row that it is given"
            if form.shape == Shape.MESSAGES:
                assert all(None not in message.values() for message in converted["messages"])

    def test_bad_rows_are_refused(self) -> None:
        """A row without the columns, and one whose words are gone, get a reason in words."""
        check = self.check()
        emptied = [empty for row in self.rows()[:3] if (empty := _emptied(row)) != row]
        bad = [{}, {"unrelated": "words"}, *emptied, *self.bad_rows]
        passed = [row for row in bad if not check(row)]
        assert passed == [], "the check takes these rows"
        assert all(isinstance(check(row), str) for row in bad)

    def test_sample_goes_through_a_run(self) -> None:
        """Loaded and converted; where ftcore tokenizes the shape, masked so that each row trains something."""
        from ftcore import hooks as h

        hooks, plan = runs.prepared([*self.base, *self.selected()])
        form = self.format()
        tokenized = form.shape in TOKENIZED
        # A trainer that takes just this shape, whichever trainers are installed.
        spec = TrainerSpec(accepts=frozenset({form.shape}), tokenized=tokenized)
        plan = replace(plan, run=replace(plan.run, trainer=TrainerConfig()), trainer=spec)
        tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
        raw = hooks.first(h.ftcore_load_dataset, plan=plan)
        formatted = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)["train"]
        assert len(formatted) >= len(raw["train"])
        columns = {"input_ids", "labels"} if tokenized else self.columns or COLUMNS[form.shape]
        assert columns <= set(formatted.column_names)


def _emptied(value: Any) -> Any:
    """The same row with every text empty."""
    if isinstance(value, Mapping):
        return {key: _emptied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_emptied(item) for item in value]
    return "" if isinstance(value, str) else value
