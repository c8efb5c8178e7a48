"""What is given as `plugins=` in Python, and what is said of a thing that would be ignored without a word."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

from ftcore import hooks as specs
from ftcore.catalog import nearest
from ftcore.errors import PluginError

MARK = f"{specs.PROJECT}_impl"
"""Attribute that `hookimpl` puts on a function."""
HOOKS = [name for name in vars(specs) if name.startswith(specs.PREFIX)]
AN_OBJECT = "name a function after a hook, and put @ftcore.hookimpl above it; docs/reference/hooks.md lists the hooks"


def named(plugins: Any) -> Iterator[tuple[str, object]]:
    """Name and plugin of each; a single function becomes an object with that one hook.

    Raises PluginError for what is no list of modules, objects and marked functions.
    """
    if isinstance(plugins, str | bytes | PurePath):
        raise _of_a_file("plugins", str(plugins))
    if not isinstance(plugins, Sequence):
        name = getattr(plugins, "__name__", "my_plugin")
        raise PluginError(
            f"plugins: takes a list, and this is a {type(plugins).__name__}\n    fix: give plugins=[{name}]"
        )
    for number, plugin in enumerate(plugins):
        name = f"python/{number}.{getattr(plugin, '__name__', type(plugin).__name__)}"
        if isinstance(plugin, str | bytes | PurePath):
            raise _of_a_file(f"plugins[{number}]", str(plugin))
        if isinstance(plugin, Sequence | Mapping):
            raise PluginError(f"plugins[{number}] is a {type(plugin).__name__}\n    fix: put its items into one list")
        if isinstance(plugin, type) and (hook := _of_an_instance(plugin)):
            fix = f"give an object: plugins=[{plugin.__name__}()]"
            raise PluginError(f"{name} is a class, and its {hook} takes self\n    fix: {fix}")
        refuse_misnamed(name, plugin)
        yield name, SimpleNamespace(**{plugin.__name__: plugin}) if inspect.isfunction(plugin) else plugin


def refuse_misnamed(name: str, plugin: object) -> None:
    """Raises PluginError for a function that is marked as a hook and named like none."""
    for function in [plugin] if inspect.isfunction(plugin) else _functions(plugin):
        options = getattr(function, MARK, None)
        if options is None or function.__name__.startswith(specs.PREFIX):
            continue
        # Compared without the prefix, which makes any two hooks alike.
        word = options.get("specname") or function.__name__
        near = nearest(word.removeprefix(specs.PREFIX), [n.removeprefix(specs.PREFIX) for n in HOOKS])
        fix = f"name it {specs.PREFIX}{near}" if near else "name it after a hook; docs/reference/hooks.md lists them"
        raise PluginError(f"{name}: {function.__name__} is marked as a hook and named like none\n    fix: {fix}")


def empty(name: str) -> PluginError:
    """The error for a plugin without a hook."""
    return PluginError(f"{name} holds no hooks\n    fix: {AN_OBJECT}")


def _of_a_file(place: str, text: str) -> PluginError:
    fix = f"name a file or a module in the words of the config: 'plugins=[{text}]'"
    return PluginError(f"{place}: takes modules, objects and functions, not the name of one: {text}\n    fix: {fix}")


def _of_an_instance(plugin: type) -> str | None:
    """A hook of a class that only its objects have."""
    for hook in (name for name in dir(plugin) if name.startswith(specs.PREFIX)):
        function = inspect.getattr_static(plugin, hook)
        if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") == "self":
            return hook
    return None


def _functions(plugin: object) -> list[Any]:
    """The functions of a module, a class or an object, by other names than a hook's; no property is read."""
    cls = plugin if isinstance(plugin, type) else type(plugin)
    places = [getattr(plugin, "__dict__", {}), *(vars(base) for base in cls.__mro__)]
    found = [value for place in places for name, value in place.items() if not name.startswith(specs.PREFIX)]
    plain = [value.__func__ if isinstance(value, staticmethod | classmethod) else value for value in found]
    return [value for value in plain if inspect.isfunction(value)]
