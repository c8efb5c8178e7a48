"""The run-scoped plugin manager: order, single functions, wrappers, conflicts, and its messages in full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ftcore import Kernel, hookimpl
from ftcore import hooks as specs
from ftcore.catalog import Catalog, installed
from ftcore.composition import compose, typed
from ftcore.config import RunConfig
from ftcore.errors import NoAnswer, PluginConflict, PluginError, Refused
from ftcore.manager import Hooks, import_function, import_plugin, selected_options, spec_names


def config(*words: str) -> RunConfig:
    return typed(compose(list(words)))


def hooks_for(*words: str, plugins: tuple[object, ...] = ()) -> Hooks:
    return Hooks.for_run(config(*words), installed(), plugins)


def test_only_selected_plugins_are_active() -> None:
    names = [info.name for info in hooks_for("+model=qwen3", "+trainer=sft").infos()]
    assert "model/qwen3" in names
    assert "trainer/sft" in names
    assert not any(name in names for name in ("model/llama", "trainer/grpo", "data/text"))


def test_selected_options_come_in_the_order_of_the_kinds() -> None:
    options = selected_options(config("+trainer=grpo", "+model=qwen3", "+export=[safetensors,adapter]"), installed())
    assert [f"{o.kind}/{o.name}" for o in options] == [
        "model/qwen3",
        "kernels/auto",
        "adapter/lora",
        "data/prompts",
        "trainer/grpo",
        "generator/fast",
        "export/safetensors",
        "export/adapter",
    ]


def test_a_single_function_overrides_a_hook() -> None:
    @hookimpl
    def ftcore_model_family() -> str:
        return "mine"

    hooks = hooks_for("+model=qwen3", plugins=(ftcore_model_family,))
    assert hooks.first(specs.ftcore_model_family, config=None) == "mine"
    assert hooks.who_answers(specs.ftcore_model_family) == ["python/0.ftcore_model_family", "model/qwen3"]


def test_python_objects_win_over_files_and_files_over_selected_plugins(tmp_path) -> None:
    file = tmp_path / "my_hooks.py"
    file.write_text("import ftcore\n@ftcore.hookimpl\ndef ftcore_model_family():\n    return 'file'\n")
    run = config("+model=qwen3", f"plugins=['{file}']")
    assert Hooks.for_run(run, installed()).first(specs.ftcore_model_family, config=None) == "file"

    @hookimpl
    def ftcore_model_family() -> str:
        return "python"

    assert (
        Hooks.for_run(run, installed(), [ftcore_model_family]).first(specs.ftcore_model_family, config=None) == "python"
    )


def test_a_wrapper_sees_and_changes_the_result() -> None:
    @hookimpl(wrapper=True)
    def ftcore_model_family():
        family = yield
        return family.model_types

    hooks = hooks_for("+model=qwen3", plugins=(ftcore_model_family,))
    assert hooks.first(specs.ftcore_model_family, config=None) == ("qwen3",)


def test_all_answers_come_in_the_order_of_selection() -> None:
    def plugin(name: str) -> object:
        @hookimpl
        def ftcore_kernels() -> list[Kernel]:
            return [Kernel(name, "role", install="a:b")]

        return SimpleNamespace(ftcore_kernels=ftcore_kernels)

    hooks = hooks_for("+model=qwen3", "kernels=[]", plugins=(plugin("one"), plugin("two")))
    assert [k.name for k in hooks.collect(specs.ftcore_kernels, family=None, device=None)] == ["one", "two"]


def test_two_selected_plugins_on_one_first_hook_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installed()
    run = config("+model=qwen3", "+quantizer=bnb_nf4")
    rival = real.find("adapter", "lora").load()
    monkeypatch.setattr(rival, "ftcore_quantization_config", hookimpl(lambda plan: None), raising=False)
    with pytest.raises(PluginConflict) as refused:
        Hooks.for_run(run, real)
    assert "both answer ftcore_quantization_config" in str(refused.value)
    assert "quantizer/bnb_nf4" in str(refused.value)
    assert "adapter/lora" in str(refused.value)


def test_unknown_hooks_wrong_arguments_and_missing_marks_are_named() -> None:
    def ftcore_model_family() -> None: ...

    with pytest.raises(PluginError, match="not marked as one"):
        hooks_for("+model=qwen3", plugins=(ftcore_model_family,))

    @hookimpl
    def ftcore_modle_family() -> None: ...

    with pytest.raises(PluginError, match="did you mean ftcore_model_family"):
        hooks_for("+model=qwen3", plugins=(ftcore_modle_family,))

    @hookimpl
    def ftcore_load_model(pln) -> None: ...

    with pytest.raises(PluginError, match="takes no argument 'pln'") as wrong:
        hooks_for("+model=qwen3", plugins=(ftcore_load_model,))
    assert "(plan, quantization)" in str(wrong.value)


def test_nobody_answers() -> None:
    with pytest.raises(NoAnswer, match=r"no active plugin answered ftcore_make_trainer; select one with \+trainer="):
        hooks_for("+model=qwen3").first(
            specs.ftcore_make_trainer,
            **dict.fromkeys(
                ("plan", "model", "tokenizer", "dataset", "collator", "rewards", "callbacks", "generator", "optimizer")
            ),
        )


def test_a_manager_is_fresh_every_time() -> None:
    first, second = hooks_for("+model=qwen3"), hooks_for("+model=llama")
    assert "model/qwen3" not in [info.name for info in second.infos()]
    assert "model/llama" not in [info.name for info in first.infos()]


def test_every_hook_has_a_docstring_and_types() -> None:
    for name in spec_names():
        spec = getattr(specs, name)
        assert spec.__doc__, name
        assert "return" in spec.__annotations__, name


def test_functions_and_files_that_are_not_there() -> None:
    with pytest.raises(Refused, match=r"there is no file nofile\.py"):
        import_plugin("nofile.py", "plugins")
    with pytest.raises(Refused, match="names no function"):
        import_function("file.py", "rewards")


def test_two_files_of_one_name_are_two_modules(tmp_path) -> None:
    modules = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "hooks.py").write_text(f"NAME = '{folder}'\n")
        modules.append(import_plugin(str(tmp_path / folder / "hooks.py"), "plugins"))
    assert [m.NAME for m in modules] == ["a", "b"]


def test_empty_catalog_knows_nothing() -> None:
    with pytest.raises(Refused, match="there is no model named 'qwen3'"):
        Catalog([]).find("model", "qwen3")
