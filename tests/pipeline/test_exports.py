"""Exporters of a run, each by itself: one that fails loses neither the run's results nor the other exports."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import ftcore
from ftcore import hookimpl
from ftcore.cli import run as command
from ftcore.errors import Problem, Refused
from ftcore.specs import Artifact, Plan

RUN = ("+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=1", "trainer.global_batch=2")
WORDS = [*RUN, "prompts=[Hello]", "sampling.max_new_tokens=1", "output_dir=run"]
REFUSES = """
from ftcore import Problem, Refused, hookimpl

@hookimpl
def ftcore_export(plan):
    raise Refused(Problem("export.mine", "it does not fit", "use another"))
"""


@hookimpl
def ftcore_export(plan: Plan) -> list[Artifact]:
    raise Refused(Problem("export.mine", "it does not fit", "use another"))


def test_what_one_refuses_costs_neither_the_results_nor_other_exports(in_tmp: Path) -> None:
    with pytest.raises(Refused) as refused:
        ftcore.run([*WORDS, "+export=[adapter]", "export.adapter.verify=false"], [ftcore_export])
    (problem,) = refused.value.problems
    assert problem.message == "it does not fit"
    assert problem.fix == "use another; what was trained is kept: ftcore export run=run '+export=[...]'"
    state = json.loads(Path("run/run.json").read_text())
    assert state["status"] == "failed"
    assert "it does not fit" in state["error"]
    assert state["steps"] == 1
    assert "eval_loss" in state["metrics"]
    assert [answer["prompt"] for answer in state["answers"]] == ["Hello"]
    assert [artifact["target"] for artifact in state["artifacts"]] == ["adapter"]
    assert Path("run/export/adapter/adapter_model.safetensors").is_file()
    assert command(["export", "run=run", "+export=[safetensors]", "export.safetensors.verify=false"]) == 0


def test_a_later_export_writes_what_it_can(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ftcore.run(WORDS)
    Path("mine.py").write_text(REFUSES)
    words = ["run=run", "+export=[adapter]", "export.adapter.verify=false", "plugins=[mine.py]"]
    assert command(["export", *words]) == 2
    said = capsys.readouterr()
    assert "it does not fit" in said.err
    assert Path("run/export/adapter") in [Path(word) for word in said.out.split()]
    assert [a["target"] for a in json.loads(Path("run/run.json").read_text())["artifacts"]] == ["adapter"]


def test_one_that_takes_what_others_write_is_left_out(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    @hookimpl(trylast=True)
    def pushes(plan: Plan) -> list[Artifact]:
        asked.append("pushes")
        return []

    @hookimpl
    def breaks(plan: Plan) -> list[Artifact]:
        raise ZeroDivisionError("of its own")

    others = [SimpleNamespace(ftcore_export=function) for function in (pushes, breaks, ftcore_export)]
    with pytest.raises(ZeroDivisionError, match="of its own"):
        ftcore.run(WORDS, others)
    said = capsys.readouterr().out
    assert not asked
    assert "left out, since it takes what others write" in said
    assert "it does not fit" in said
    assert "ftcore export run=run" in said
    ftcore.run([*WORDS[:-1], "output_dir=whole"], others[:1])
    assert asked == ["pushes"]


def test_a_wrapper_or_a_generator_that_fails_loses_no_results_either(in_tmp: Path) -> None:
    @hookimpl(wrapper=True)
    def wraps() -> Generator[None, list[Artifact], list[Artifact]]:
        yield
        raise ValueError("around")

    @hookimpl
    def yields() -> Iterator[Artifact]:
        raise ValueError("inside")
        yield

    for function, said in ((wraps, "around"), (yields, "inside")):
        with pytest.raises(ValueError, match=said):
            ftcore.run([*WORDS[:-1], f"output_dir={said}"], [SimpleNamespace(ftcore_export=function)])
        state = json.loads(Path(said, "run.json").read_text())
        assert (state["status"], state["steps"]) == ("failed", 1)
