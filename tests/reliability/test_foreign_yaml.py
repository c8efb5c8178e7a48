"""YAML of others is data: what it says to Hydra is refused before Hydra reads it, and has no effect on a single run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from yaml_attacks import FILES, PAYLOADS, SECRET, WAYS

from ftcore import foreign_yaml, pipeline
from ftcore.catalog import installed
from ftcore.cli import run as command
from ftcore.composition import compose, typed
from ftcore.errors import Refused

SCRIPT = Path(__file__).with_name("yaml_attacks.py")
OURS = "# @package _global_\n"

WORDS = (
    "+model=llama",
    "model.tiny=true",
    "+trainer=sft",
    "trainer.max_steps=1",
    "+recipe=evil",
    "--config-dir",
    "conf",
)


@pytest.fixture
def recipe(in_tmp: Path):
    (in_tmp / "conf" / "recipe").mkdir(parents=True)
    (in_tmp / "canary").write_text("the canary")

    def write(text: str, name: str = "recipe/evil.yaml") -> Path:
        file = in_tmp / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def attacked(folder: Path, *chosen: str) -> list[dict[str, Any]]:
    """What came of the payloads, in a process that watches itself."""
    command_line = [sys.executable, str(SCRIPT), *chosen]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=folder, timeout=300, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_payload_in_any_way_has_an_effect(in_tmp: Path) -> None:
    """Refused with a message, nothing made, opened or run, no secret shown, by plan and by sweep."""
    assert len(PAYLOADS) >= 60
    lines = attacked(in_tmp)
    assert {(line["name"], line["way"]) for line in lines} == {
        (name, way) for name in PAYLOADS for way in WAYS if way != "CLI" or name not in FILES
    }
    for line in lines:
        assert line["code"] in (2, 65), line
        assert line["touched"] == line["made"] == [], line
        assert SECRET not in line["said"], line
        assert line["said"].startswith("ftcore: "), line
        if line["way"] != "CLI":
            assert "evil.yaml" in line["said"], line


def test_what_one_could_wish_for_is_seen_by_the_watch(in_tmp: Path) -> None:
    """The same process does see a copy that Hydra makes: else the test above would prove nothing."""
    watched = attacked(in_tmp, "control@CLI")
    assert [line["touched"] != [] and line["made"] == ["stolen"] for line in watched] == [True]


def test_a_recorded_config_of_others_is_data_as_well(in_tmp: Path, capsys) -> None:
    run = in_tmp / "run"
    run.mkdir()
    for text, said in (
        ("trainer:\n  name: sft\n  args:\n    x: {_target_: os.system}\n", "trainer.args.x: holds `_target_`"),
        ("objective: ${oc.env:PATH}\n", "objective: reads `${oc.env:PATH`"),
        ("objective: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ):
        (run / "config.yaml").write_text(text)
        assert command(["plan", "run=run"]) in (2, 65)
        assert said in capsys.readouterr().err


def test_listed_variables_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = typed(compose(["+model=llama", "output_dir='out-${oc.env:SLURM_JOB_ID}'"]))
    assert run.output_dir == "out-77"


def test_a_package_names_no_python_files(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code comes by entry points; a recipe of one's own may name one's own files."""
    folder = in_tmp / "foreign_conf" / "recipe"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "evil.yaml").write_text("# @package _global_\nplugins: [downloaded.py]\n")
    monkeypatch.syspath_prepend(str(in_tmp))
    monkeypatch.setitem(installed().conf, "foreign", "foreign_conf")
    with pytest.raises(Refused, match=r"evil\.yaml: sets plugins, which only ftcore and the command line may"):
        compose(["+model=llama", "+recipe=evil"])
    monkeypatch.delitem(installed().conf, "foreign")
    with pytest.raises(Refused, match=r"downloaded\.py"):
        pipeline.prepare(typed(compose(["+model=llama", "+recipe=evil"], str(folder.parent))))


def test_a_group_of_hydras_own_is_refused(recipe, capsys, in_tmp: Path) -> None:
    recipe("version: 1\n", "hydra/job_logging/none.yaml")
    recipe("# @package _global_\ntrainer:\n  seed: 7\n")
    assert command(["-m", *WORDS]) == 2
    assert "lies in a folder named hydra" in capsys.readouterr().err


def test_an_alias_bomb_is_no_danger(recipe, capsys) -> None:
    levels = "\n".join(f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(9))}}}" for n in range(1, 12))
    recipe("a0: &a0 {x: 1}\n" + levels + "\n")
    assert command(["-m", *WORDS]) in (2, 65)
    assert "evil.yaml" in capsys.readouterr().err


def test_folders_and_parameters_of_a_sweep_stay_open(recipe, capsys) -> None:
    text = OURS + "hydra:\n  sweep:\n    dir: mine\n  sweeper:\n    params:\n      trainer.seed: 1,2\n"
    recipe(text)
    assert command(["--cfg", "job", *WORDS]) == 0
    capsys.readouterr()


NAMED = (
    "{runs/sweep-1@_global_: multirun}",
    "{./runs/sweep-1: multirun}",
    "{recipe: ../runs/sweep-1/multirun}",
    "{optional Runs/sweep-1: multirun}",
    "runs/sweep-1/multirun",
    "{'${a}': multirun}",
)
"""Ways in which a file that can be selected may name one below another folder."""


def test_records_of_runs_below_the_folder_are_nobody_s_to_select(in_tmp: Path) -> None:
    for place in ("runs/sweep-1/multirun.yaml", ".github/workflows/ci.yml"):
        Path(place).parent.mkdir(parents=True)
        Path(place).write_text("defaults: x\nhydra: {job_logging: {root: y}}\n", encoding="utf-8")
    foreign_yaml.check(".")
    for entry in NAMED:
        Path("mine.yaml").write_text(f"defaults: [{entry}]\n", encoding="utf-8")
        with pytest.raises(Refused, match=r"hydra\.job_logging"):
            foreign_yaml.check(".")


def test_a_comment_reads_no_environment(in_tmp: Path) -> None:
    Path("recipe").mkdir()
    Path("recipe/a.yaml").write_text("# not ${oc.env:HF_TOKEN}\nmemory: least\n", encoding="utf-8")
    foreign_yaml.check(".")
    Path("recipe/a.yaml").write_text("memory: ${oc.env:HF_TOKEN}\n", encoding="utf-8")
    with pytest.raises(Refused, match="HF_TOKEN"):
        foreign_yaml.check(".")
