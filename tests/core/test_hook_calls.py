"""One call of a hook: what goes into a wrapper, what may come out of it, and answers that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ftcore import Problem, hookimpl
from ftcore import hooks as specs
from ftcore.errors import NoAnswer, PluginError
from ftcore.manager import Hooks

wrapper = hookimpl(wrapper=True)


def hooks_of(*functions: Callable[..., Any]) -> Hooks:
    hooks = Hooks()
    for number, function in enumerate(functions):
        hooks.add_core(SimpleNamespace(**{function.__name__: function}), f"plugin/{number}")
    return hooks


def says(answer: Any, name: str = "ftcore_check_plan") -> Callable[..., Any]:
    def function() -> Any:
        return answer() if callable(answer) else answer

    function.__name__ = name
    return hookimpl(function)


def problems(*names: str) -> Callable[..., Any]:
    return says([Problem(name, "is wrong") for name in names])


def found(*functions: Callable[..., Any]) -> list[str]:
    return [p.key for p in hooks_of(*functions).collect(specs.ftcore_check_plan, plan=None)]


def test_a_wrapper_around_an_all_hook_sees_one_list_in_the_order_of_selection() -> None:
    seen = []

    def adds(name: str) -> Callable[..., Any]:
        @wrapper
        def ftcore_check_plan():
            given = yield
            seen.append([p.key for p in given])
            return [*given, Problem(name, "is wrong")]

        return ftcore_check_plan

    names = found(problems("one"), adds("inner"), problems("two", "three"), says(None), adds("outer"))
    assert names == ["one", "two", "three", "inner", "outer"]
    assert seen == [["one", "two", "three"], ["one", "two", "three", "inner"]]


def test_wrappers_get_the_exceptions_of_the_stage() -> None:
    @wrapper
    def ftcore_check_plan():
        try:
            return (yield)
        except ValueError:
            return [Problem("caught", "is wrong")]

    def fails() -> None:
        raise ValueError

    assert found(says(fails), ftcore_check_plan) == ["caught"]


@pytest.mark.parametrize("name", ["ftcore_load_model", "ftcore_quantization_config", "ftcore_check_plan"])
def test_a_wrapper_without_return_is_named(name: str) -> None:
    def forgetful():
        yield

    forgetful.__name__ = name
    good = says([] if name == "ftcore_check_plan" else "answer", name)
    spec = getattr(specs, name)
    arguments = dict.fromkeys(("plan", "quantization")) if name == "ftcore_load_model" else {"plan": None}

    @wrapper
    def kept():
        return (yield)

    kept.__name__ = name
    hooks = hooks_of(good, wrapper(forgetful), kept)
    with pytest.raises(PluginError) as wrong:
        (hooks.collect if name == "ftcore_check_plan" else hooks.maybe)(spec, **arguments)
    assert str(wrong.value) == (
        f"plugin/1 wraps {name} and returns nothing\n    fix: end it with return: answer = yield; return answer"
    )


def test_a_wrapper_may_have_nothing_to_pass_on() -> None:
    @wrapper
    def ftcore_load_model():
        return (yield)

    hooks = hooks_of(says(None, "ftcore_load_model"), ftcore_load_model)
    assert hooks.maybe(specs.ftcore_load_model, plan=None, quantization=None) is None
    with pytest.raises(NoAnswer):
        hooks.first(specs.ftcore_load_model, plan=None, quantization=None)


@pytest.mark.parametrize(
    ("answer", "kind"), [(Problem("one", "is wrong"), "Problem"), ("text", "str"), ({"key": "value"}, "dict")]
)
@pytest.mark.parametrize("wraps", [False, True], ids=["plain", "wrapper"])
def test_an_answer_to_an_all_hook_that_is_no_list_is_named(answer: Any, kind: str, wraps: bool) -> None:
    @wrapper
    def ftcore_check_plan():
        yield
        return answer

    with pytest.raises(PluginError) as wrong:
        found(problems("good"), ftcore_check_plan if wraps else says(answer))
    message = f"plugin/1: ftcore_check_plan returns a list, and this is a {kind}\n    fix: return [it]"
    assert str(wrong.value) == message


def test_a_generator_answers_an_all_hook_and_one_that_meant_to_wrap_is_told() -> None:
    @hookimpl
    def ftcore_check_plan():
        yield Problem("one", "is wrong")

    assert found(ftcore_check_plan, problems("two")) == ["one", "two"]

    @hookimpl
    def unmarked():
        given = yield
        return given

    unmarked.__name__ = "ftcore_check_plan"
    with pytest.raises(PluginError, match=r"plugin/0: .*there is a None in it\n +fix: .*hookimpl\(wrapper=True\)"):
        found(unmarked)
    with pytest.raises(PluginError, match=r"there is a None in it\n +fix: leave it out"):
        found(says([None]))


def test_a_wrapper_without_yield_is_named() -> None:
    @wrapper
    def ftcore_check_plan():
        return []

    with pytest.raises(PluginError) as wrong:
        hooks_of(ftcore_check_plan)
    assert str(wrong.value) == (
        "plugin/0 (ftcore): ftcore_check_plan is marked as a wrapper and has no yield\n"
        "    fix: answer = yield; return answer"
    )


def test_a_generator_that_answers_a_first_hook_was_meant_to_wrap() -> None:
    @hookimpl
    def ftcore_load_model():
        model = yield
        return model

    with pytest.raises(PluginError) as wrong:
        hooks_of(ftcore_load_model)
    assert str(wrong.value) == (
        "plugin/0: ftcore_load_model yields, and is not marked as a wrapper\n"
        "    fix: write @ftcore.hookimpl(wrapper=True) above it"
    )
