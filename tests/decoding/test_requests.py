"""Who is completed when."""

from __future__ import annotations

from ftcore_kernels.decoding.requests import Queue, Request, by_prompt


def asked(*prompts: str) -> list[Request]:
    return [Request(index, tuple(map(ord, prompt)), 5, 0) for index, prompt in enumerate(prompts)]


def test_all_begin_where_there_is_room() -> None:
    queue = Queue(asked("a", "b", "c"), rows=4)
    assert [request.index for _, request in queue.admitted()] == [0, 1, 2]
    assert queue.admitted() == []
    for row in list(queue.running):
        queue.finish(row)
    assert not queue


def test_a_row_that_is_free_is_taken_by_the_next() -> None:
    queue = Queue(asked(*"abcde"), rows=2)
    first = dict(queue.admitted())
    assert [request.index for request in first.values()] == [0, 1]
    row = next(iter(first))
    queue.finish(row)
    [(again, request)] = queue.admitted()
    assert (again, request.index) == (row, 2)


def test_a_large_batch_waits_until_filling_is_worth_it() -> None:
    queue = Queue(asked(*"abcdefghijklmnopqrstuvwx"), rows=16)
    rows = [row for row, _ in queue.admitted()]
    queue.finish(rows[0])
    assert queue.admitted() == [], "one of sixteen"
    queue.finish(rows[1])
    assert len(queue.admitted()) == 2


def test_a_prompt_is_read_once() -> None:
    passes = list(by_prompt(list(enumerate(asked("aa", "bb", "aa", "ccc"))), tokens=5))
    assert [[[row for row, _ in group] for group in one] for one in passes] == [[[0, 2], [1]], [[3]]]


def test_a_prompt_longer_than_a_pass_has_one_of_its_own() -> None:
    passes = list(by_prompt(list(enumerate(asked("a", "b" * 9, "c"))), tokens=4))
    assert [len(one) for one in passes] == [1, 1, 1]
