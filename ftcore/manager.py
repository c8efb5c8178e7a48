"""The plugin manager of one run: core, the selected plugins, and whatever the user added, in that order."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import pluggy

from ftcore import given_plugins
from ftcore import hooks as specs
from ftcore.catalog import Catalog, Option, nearest
from ftcore.config import KINDS, MANY, RunConfig
from ftcore.errors import Exit, FtcoreError, NoAnswer, PluginConflict, PluginError, Problem, Refused
from ftcore.hook_calls import Manager, is_wrapper, refuse_unmarked
from ftcore.specs import PluginInfo

P = ParamSpec("P")
R = TypeVar("R")

WHO_ANSWERS = {
    "ftcore_model_family": "+model=",
    "ftcore_trainer_spec": "+trainer=",
    "ftcore_make_trainer": "+trainer=",
    "ftcore_adapt_model": "adapter=",
    "ftcore_data_format": "data=",
    "ftcore_make_generator": "generator=",
}


class Hooks:
    """Typed calls of the hooks of one run."""

    def __init__(self) -> None:
        self._pm = Manager(specs.PROJECT)
        self._pm.add_hookspecs(specs)
        self._origins: dict[str, str] = {}

    @classmethod
    def for_run(cls, config: RunConfig, catalog: Catalog, plugins: Sequence[object] = ()) -> Hooks:
        """Core, then the selected options in the order of the kinds, then `config.plugins`, then `plugins`.

        Raises PluginConflict when two selected plugins answer the same first hook, PluginError for hooks that do not
        match their specs, Refused for a file or module that does not exist.
        """
        from ftcore import defaults

        hooks = cls()
        for module in defaults.modules():
            hooks._register(module, f"core/{module.__name__.rpartition('.')[2]}", "ftcore")
        selected = [option.load() for option in selected_options(config, catalog)]
        for option, module in zip(selected_options(config, catalog), selected, strict=True):
            hooks._register(module, f"{option.kind}/{option.name}", option.origin)
        hooks._refuse_conflicts([f"{o.kind}/{o.name}" for o in selected_options(config, catalog)])
        for text in config.plugins:
            module = import_plugin(text, "plugins")
            given_plugins.refuse_misnamed(f"plugins/{text}", module)
            hooks._register(module, f"plugins/{text}", text)
        for name, plugin in given_plugins.named(plugins):
            hooks._register(plugin, name, "python")
            if not any(hooks._implemented(plugin)):
                raise given_plugins.empty(name)
        return hooks

    def add_core(self, plugin: object, name: str) -> None:
        """Register an object of core's that needs these hooks itself. Its impls are `trylast`."""
        self._register(plugin, name, "ftcore")

    def first(self, spec: Callable[P, R | None], *args: P.args, **kwargs: P.kwargs) -> R:
        """The answer of a first hook.

        Raises NoAnswer when nobody answers.
        """
        answer: R | None = self.maybe(spec, *args, **kwargs)
        if answer is None:
            name = _name(spec)
            hint = f"; select one with {WHO_ANSWERS[name]}..." if name in WHO_ANSWERS else ""
            raise NoAnswer(f"no active plugin answered {name}{hint}")
        return answer

    def maybe(self, spec: Callable[P, R | None], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The answer of a first hook, or None."""
        answer: R | None = getattr(self._pm.hook, _name(spec))(**kwargs)
        return answer

    def collect(self, spec: Callable[P, Sequence[R]], *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """All answers of an all hook, joined in the order of selection, and what wrappers made of that list.

        Raises PluginError for an answer that is no list.
        """
        answers: list[R] = getattr(self._pm.hook, _name(spec))(**kwargs)
        return answers

    def collect_apart(
        self, spec: Callable[P, Sequence[R]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[list[R], dict[str, Exception], list[str]]:
        """As `collect`, but what one plugin raises keeps no other from answering; wrappers see no exception.

        Also names of plugins to what they raised, and the plugins that are `trylast` and were not asked after that.
        What a wrapper raises stands under the hook's name, and leaves no answer.
        """
        failed: dict[str, Exception] = {}
        skipped: list[str] = []
        with ExitStack() as guards:
            for impl in getattr(self._pm.hook, _name(spec)).get_hookimpls():
                if not is_wrapper(impl):
                    guards.enter_context(_guarded(impl, failed, skipped))
            try:
                return self.collect(spec, *args, **kwargs), failed, skipped
            except Exception as error:
                failed[_name(spec)] = error
                return [], failed, skipped

    def infos(self) -> tuple[PluginInfo, ...]:
        """Every active plugin, in order of registration."""
        return tuple(
            PluginInfo(name=name, origin=self._origins[name], hooks=tuple(sorted(self._implemented(plugin))))
            for name, plugin in self._pm.list_name_plugin()
            if plugin is not None
        )

    def taken(self, spec: Callable[..., Any], argument: str) -> bool:
        """Whether a plugin that answers the hook, or wraps it, takes this argument of it."""
        impls = getattr(self._pm.hook, _name(spec)).get_hookimpls()
        return any(argument in (*impl.argnames, *impl.kwargnames) for impl in impls)

    def who_answers(self, spec: Callable[..., Any]) -> list[str]:
        """Names of the plugins behind a hook, the one that is asked first in front; wrappers carry a `~`."""
        caller = getattr(self._pm.hook, _name(spec))
        return [("~" if is_wrapper(impl) else "") + impl.plugin_name for impl in reversed(caller.get_hookimpls())]

    def _register(self, plugin: object, name: str, origin: str) -> None:
        for hook in (n for n in dir(plugin) if n.startswith(specs.PREFIX)):
            if not hasattr(specs, hook) and callable(getattr(plugin, hook)):
                near = nearest(hook, spec_names())
                fix = f"did you mean {near}?" if near else "docs/reference/hooks.md lists the hooks"
                raise PluginError(f"{name} ({origin}) implements an unknown hook {hook}\n    fix: {fix}")
        try:
            self._pm.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{name} ({origin}): {_signature_hint(plugin) or error}") from error
        except ValueError as error:
            raise PluginError(f"{name} ({origin}) is given twice\n    fix: name it once") from error
        self._origins[name] = origin
        for caller in self._pm.get_hookcallers(plugin) or []:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    refuse_unmarked(impl, caller.name, _is_first(caller.name))

    def _implemented(self, plugin: object) -> Iterator[str]:
        callers = self._pm.get_hookcallers(plugin) or []
        return (caller.name for caller in callers)

    def _refuse_conflicts(self, selected: Sequence[str]) -> None:
        for name in spec_names():
            if not _is_first(name):
                continue
            impls = getattr(self._pm.hook, name).get_hookimpls()
            rivals = [i.plugin_name for i in impls if i.plugin_name in selected and not is_wrapper(i)]
            if len(rivals) > 1:
                raise PluginConflict(
                    f"{' and '.join(f'{r} ({self._origins[r]})' for r in rivals)} both answer {name}\n"
                    "    fix: select only one of them, make one a wrapper, or settle it with plugins=[my_hooks.py]"
                )


def spec_names() -> list[str]:
    """All hook names, in call order."""
    return [name for name in vars(specs) if name.startswith(specs.PREFIX)]


def selected_options(config: RunConfig, catalog: Catalog) -> list[Option]:
    """The selected options, in the order of the kinds and, within one, in the order given."""
    options = []
    for kind in KINDS:
        value = getattr(config, kind)
        names = list(value) if kind in MANY else [value.name] if value is not None else []
        options += [catalog.find(kind, value[n].name or n if kind in MANY else n) for n in names]
    return options


def import_plugin(text: str, key: str) -> ModuleType:
    """Import `package.module` or `path/to/file.py`.

    Raises Refused when it is not there, PluginError when it does not import.
    """
    try:
        if not text.endswith(".py"):
            return importlib.import_module(text)
        path = Path(text).expanduser().resolve()
        if not path.is_file():
            raise Refused(
                Problem(
                    key, f"there is no file {text}", "paths are relative to where you run ftcore", Exit.MISSING_INPUT
                )
            )
        # A name of its own: two files called hooks.py in different folders must not be one module, nor must an
        # edited file be its old self in a notebook; the same file named twice is run once.
        stamp = f"{path}:{path.stat().st_mtime_ns}"
        name = f"ftcore_user_{path.stem}_{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up by name
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except FtcoreError:
        raise
    except Exception as error:
        raise PluginError(
            f"{key}=[{text}] cannot be imported: {type(error).__name__}: {error}\n"
            f"    fix: mend {text}; python {text} shows where"
        ) from error


def import_function(text: str, key: str) -> Callable[..., Any]:
    """Import `file.py:function` or `package.module:function`.

    Raises Refused when the text has no colon or the module has no such function.
    """
    source, _, name = text.rpartition(":")
    if not source:
        raise Refused(Problem(key, f"'{text}' names no function", f"write {key}=[{text}:my_function]"))
    module = import_plugin(source, key)
    function = getattr(module, name, None)
    if not callable(function):
        near = nearest(name, [n for n, v in vars(module).items() if inspect.isfunction(v)])
        raise Refused(
            Problem(key, f"{source} has no function '{name}'", f"did you mean {source}:{near}?" if near else "")
        )
    return function  # type: ignore[no-any-return]


def _signature_hint(plugin: object) -> str | None:
    for name in dir(plugin):
        spec = getattr(specs, name, None)
        if not name.startswith(specs.PREFIX) or not inspect.isfunction(spec):
            continue
        known = list(inspect.signature(spec).parameters)
        wrong = [p for p in inspect.signature(getattr(plugin, name)).parameters if p not in known]
        if wrong:
            fix = f"its arguments are ({', '.join(known)}); leave out what you do not need"
            return f"{name} takes no argument '{wrong[0]}'\n    fix: {fix}"
        options = getattr(getattr(plugin, name), given_plugins.MARK, {})
        if options.get("wrapper") and not inspect.isgeneratorfunction(getattr(plugin, name)):
            return f"{name} is marked as a wrapper and has no yield\n    fix: answer = yield; return answer"
    return None


@contextmanager
def _guarded(impl: Any, failed: dict[str, Exception], skipped: list[str]) -> Iterator[None]:
    """Inside the block an implementation of this run's hooks notes what it raises, and answers nothing then."""
    own = impl.function

    def function(*args: Any) -> Any:
        if impl.trylast and failed:
            skipped.append(impl.plugin_name)
            return None
        try:
            answer = own(*args)
            return list(answer) if inspect.isgenerator(answer) else answer  # it raises only when it is read
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # else it keeps weights in memory while others are asked
            failed[impl.plugin_name] = error
            return None

    impl.function = function
    try:
        yield
    finally:
        impl.function = own


def _name(spec: Callable[..., Any]) -> str:
    return spec.__name__


def _is_first(name: str) -> bool:
    return bool((getattr(specs, name).ftcore_spec or {}).get("firstresult"))
