"""Takes a core out of a product of parameters: the default step runs few of them, CI's slow step the rest.

A test that is marked `few` and has parameters runs by default in as many cases as it takes for every value of every
parameter to occur, chosen so that the values meet others each time; its other cases are marked `slow`. Where there is a
GPU nothing is left out: there the cases take no time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pytest

Value = tuple[str, int]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark what the default step leaves out."""
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("few") and hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
    if not tests or _has_gpu():
        return
    for cases in tests.values():
        candidates = [case for case in cases if not _left_out(case)]
        core = covering([_values(case) for case in candidates])
        for number, case in enumerate(candidates):
            if number not in core:
                case.add_marker(pytest.mark.slow)


def covering(cases: Sequence[Iterable[Value]]) -> set[int]:
    """Numbers of the cases that together have every value, greedily.

    Next is the case with most values that are missing; of those the one whose others were used least, then the first.
    """
    values = [tuple(case) for case in cases]
    missing, used, core = {value for case in values for value in case}, Counter[Value](), set[int]()
    while missing:
        best = max(
            range(len(values)),
            key=lambda n: (len(missing.intersection(values[n])), -sum(used[value] for value in values[n]), -n),
        )
        core.add(best)
        missing.difference_update(values[best])
        used.update(values[best])
    return core


def _values(case: pytest.Function) -> list[Value]:
    # Cases of one product share the objects; pytest numbers them anew, so its indices do not tell.
    return [(name, id(value)) for name, value in case.callspec.params.items()]


def _left_out(case: pytest.Function) -> bool:
    """Whether the default step leaves it out, or skips it, anyway."""
    skips = any(mark.args and mark.args[0] is True for mark in case.iter_markers("skipif"))
    return skips or case.get_closest_marker("slow") is not None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
