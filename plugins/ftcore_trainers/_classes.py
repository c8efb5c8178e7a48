"""The classes of labelled rows: found, named, and turned into targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, checkpoint
from ftcore.catalog import nearest
from ftcore.errors import Exit
from ftcore_trainers._class_names import of_adapter
from ftcore_trainers._encoded import Encoder
from ftcore_trainers._local_rows import all_local, converted

if TYPE_CHECKING:
    import torch

FEW = 10
"""Rows up to which each may well have a class of its own."""


def name_of(label: Any) -> str:
    """A class by its name: `good`, `3` for 3 and 3.0, `true` for True."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()


def each(label: Any) -> list[Any]:
    """The labels of a row, one or several."""
    return label if isinstance(label, list) else [label]


def found(plan: Plan) -> tuple[list[str], bool]:
    """The names that the rows use, in order, and whether a row may have several of them.

    The order is that of the own classes of the checkpoint or the adapter, if it has these, else of the numbers or of
    the alphabet.
    """
    labels = [row["label"] for _, row in converted(plan)]
    names = {name_of(one) for label in labels for one in each(label)}
    several = any(isinstance(label, list) for label in labels)
    own = own_classes(plan)
    if names and names <= set(own):
        return own, several
    return sorted(names, key=lambda name: (0, int(name), "") if _is_number(name) else (1, 0, name)), several


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def own_classes(plan: Plan) -> list[str]:
    """The classes of an adapter or a checkpoint that was trained to classify; empty for any other."""
    if names := of_adapter(plan):
        return names
    assert plan.run.model is not None
    config = checkpoint.read_config(plan.run.model, plan.family) or {}
    trained = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    known = config.get("id2label") or {}
    return [str(known[key]) for key in sorted(known, key=int)] if trained else []


def index(label: Any, classes: Sequence[str]) -> int | None:
    """The number of a class, by its name, or by its number where no class is called so; None for neither."""
    name = name_of(label)
    if name in classes:
        return list(classes).index(name)
    return int(name) if name.isdecimal() and int(name) < len(classes) else None


def problems(plan: Plan, classes: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the classes, and the first row of each kind with a label that is none."""
    if not classes:
        if not all_local(plan):
            fix = "name them in their order, such as 'trainer.labels=[negative,positive]'"
            yield Problem("trainer.labels", "the classes of streamed rows and of the hub's are not known before", fix)
        return
    if len(set(classes)) < max(len(classes), 2):
        one = next((name for name in classes if list(classes).count(name) > 1), None)
        message = f"names '{one}' twice" if one else f"there is only one class, '{classes[0]}'"
        yield Problem("trainer.labels", message, "give rows of two classes or more, each with a name of its own")
        return
    own = own_classes(plan)
    if own and len(own) != len(classes):
        what = "the adapter" if of_adapter(plan) else "the checkpoint"
        message = f"the rows have {len(classes)} classes, and {what} was trained for {len(own)}: {shown(own)}"
        yield Problem("trainer.labels", message, "give rows of these classes, or begin without that head")
        return
    if own and own != list(classes) and set(own) == set(classes):
        message = f"has another order than the classes that the model was trained for: {shown(own)}"
        yield Problem("trainer.labels", message, "leave it out")
        return
    yield from _rows(plan, classes)


def _rows(plan: Plan, classes: Sequence[str]) -> Iterator[Problem]:
    strange: dict[str, str] = {}
    rows = 0
    for place, row in converted(plan):
        rows += 1
        for label in each(row["label"]):
            if isinstance(label, float) and not label.is_integer():
                yield Problem(place, f"label {label} is a quantity, not a class", "give classes by name", Exit.DATA)
                return
            if index(label, classes) is None:
                strange.setdefault(name_of(label), place)
    for name, place in strange.items():
        near = nearest(name, classes)
        fix = f"did you mean '{near}'?" if near else "add it to trainer.labels, or take the row out"
        yield Problem(place, f"label '{name}' is none of trainer.labels: {shown(classes)}", fix, Exit.DATA)
    if rows > FEW and len(classes) > rows / 2:
        message = f"{rows} rows have {len(classes)} classes, such as {shown(list(classes)[:3])}"
        yield Problem("data", message, "put the class, not a text, in 'label'", Exit.DATA)


def shown(names: Iterable[str]) -> str:
    """Names in a line."""
    return ", ".join(f"'{name}'" for name in names)


@dataclass(frozen=True)
class LabelledTexts:
    """Collates texts, or pairs of texts, with their classes."""

    encode: Encoder
    classes: Sequence[str]
    several: bool
    """A row may have several classes: targets are 0 and 1 `[rows, classes]` in float32, else numbers `[rows]`."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the inputs and `labels`.

        Raises Refused for a label that is no class, or several where there is one: rows that no plan has seen.
        """
        import torch

        from ftcore import Refused

        pairs = [row.get("text_pair") or "" for row in rows]
        batch = self.encode([row["text"] for row in rows], pairs if any(pairs) else None)
        numbers = [[self._index(label) for label in each(row["label"])] for row in rows]
        if not self.several and any(len(of_row) != 1 for of_row in numbers):
            message = "a row has a list of classes, and a row of this run has one"
            raise Refused(Problem("trainer.multi_label", message, "set trainer.multi_label=true", Exit.DATA))
        return batch | {"labels": self._several(numbers) if self.several else torch.tensor([n[0] for n in numbers])}

    def _several(self, numbers: Sequence[Sequence[int]]) -> torch.Tensor:
        import torch

        targets = torch.zeros(len(numbers), len(self.classes))
        for row, classes in enumerate(numbers):
            targets[row, list(classes)] = 1
        return targets

    def _index(self, label: Any) -> int:
        from ftcore import Refused

        number = index(label, self.classes)
        if number is None:
            message = f"label '{name_of(label)}' is none of {shown(self.classes)}"
            raise Refused(Problem("trainer.labels", message, "name all classes of the rows", Exit.DATA))
        return number
