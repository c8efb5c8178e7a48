"""One call of a hook: who is asked, who is wrapped around them, and whether what they say can be used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pluggy

from ftcore import hooks as specs
from ftcore.errors import PluginError

Ask = Callable[[Sequence[pluggy.HookImpl]], Any]
PLAIN: Any = dict.fromkeys(("wrapper", "hookwrapper", "optionalhook", "tryfirst", "trylast"), False) | {
    "specname": None
}
"""pluggy's options of an implementation that is none of these."""


class Manager(pluggy.PluginManager):
    """pluggy's manager, with wrappers that go around a stage's whole answer, and answers that are looked at."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """The options of an implementation, None for what is none.

        Raises PluginError for a function that is named like a hook and not marked as one.
        """
        # Touch hook names only: a plugin may have attributes that are costly or unsafe to read (pytest #1073).
        if not name.startswith(specs.PREFIX):
            return None
        opts = super().parse_hookimpl_opts(plugin, name)
        if opts is None and inspect.isfunction(function := getattr(plugin, name)):
            raise PluginError(
                f"{name} in {Path(function.__code__.co_filename).name} is named like a hook but is not marked as one\n"
                "    fix: put @ftcore.hookimpl above it"
            )
        return opts

    # Semi-private, and the one place through which pluggy calls (1.5 to 1.7): its own way gives a wrapper around an all
    # hook a list of lists, in the order of asking, and takes a wrapper without `return` for one that says None.
    def _hookexec(
        self, hook_name: str, methods: Sequence[pluggy.HookImpl], kwargs: Mapping[str, object], firstresult: bool
    ) -> Any:
        ask = partial(super()._hookexec, hook_name, kwargs=kwargs, firstresult=True)
        plain = [impl for impl in methods if not is_wrapper(impl)]
        answer: Callable[[], Any] = partial(ask, plain) if firstresult else partial(_joined, hook_name, ask, plain)
        for wrapper in filter(is_wrapper, methods):  # the last one is the outermost
            answer = partial(_around, hook_name, ask, wrapper, answer, firstresult)
        return answer()


def _joined(hook: str, ask: Ask, plain: Sequence[pluggy.HookImpl]) -> list[Any]:
    """The answers to an all hook in the order of selection; asked is, as pluggy does it, the last one first."""
    answers = [ask([impl]) for impl in reversed(plain)]
    said = zip(plain, reversed(answers), strict=True)
    return [item for impl, answer in said if answer is not None for item in items(hook, impl, answer)]


def _around(hook: str, ask: Ask, wrapper: pluggy.HookImpl, inside: Callable[[], Any], firstresult: bool) -> Any:
    """What a wrapper makes of the answer inside it, or of the exception, which pluggy throws into it."""
    given = None

    def stage() -> Any:
        nonlocal given
        given = inside()
        return given

    answer = ask([pluggy.HookImpl(None, "core/answers", stage, PLAIN), wrapper])
    if answer is None and (given is not None or not firstresult):
        raise PluginError(
            f"{wrapper.plugin_name} wraps {hook} and returns nothing\n"
            "    fix: end it with return: answer = yield; return answer"
        )
    return answer if firstresult else items(hook, wrapper, answer)


def is_wrapper(impl: pluggy.HookImpl) -> bool:
    """Whether it goes around a stage, in pluggy's new way or its old one."""
    return bool(impl.wrapper or impl.hookwrapper)


def items(hook: str, impl: pluggy.HookImpl, answer: Any) -> list[Any]:
    """The answer of one plugin to an all hook, as a list. Raises PluginError for what is none, and for None in it."""
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | Mapping):
        raise PluginError(
            f"{impl.plugin_name}: {hook} returns a list, and this is a {type(answer).__name__}\n    fix: return [it]"
        )
    found = list(answer)
    if any(item is None for item in found):
        fix = "leave it out of the list"
        if inspect.isgenerator(answer):
            fix = "for a function around the stage, write @ftcore.hookimpl(wrapper=True); else yield what it gives"
        raise PluginError(f"{impl.plugin_name}: {hook} returns a list, and there is a None in it\n    fix: {fix}")
    return found


def refuse_unmarked(impl: pluggy.HookImpl, hook: str, firstresult: bool) -> None:
    """Raises PluginError for a function that yields and is no wrapper, where a hook takes one answer."""
    if firstresult and not is_wrapper(impl) and inspect.isgeneratorfunction(impl.function):
        raise PluginError(
            f"{impl.plugin_name}: {hook} yields, and is not marked as a wrapper\n"
            "    fix: write @ftcore.hookimpl(wrapper=True) above it"
        )
