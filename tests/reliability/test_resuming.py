"""The same command goes on by itself, says what changed meanwhile, and leaves what is another's alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ftcore import checkpoint, drift
from ftcore.catalog import installed
from ftcore.cli import run as command
from ftcore.locks import held

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def interrupted(in_tmp: Path) -> tuple[Path, list[str]]:
    """A run of two steps that lacks its end, as a killed one does, and the words of its command."""
    family = installed().find("model", "llama").load().ftcore_model_family()
    config = installed().find("model", "llama").load().Config(name="llama", tiny=True)
    shutil.copytree(checkpoint.locate(config, family), in_tmp / "base")
    write_rows(in_tmp / "rows.jsonl", ROWS)
    shutil.copy(Path(drift.__file__).parent / "chat_templates" / "chatml.jinja", in_tmp / "own.jinja")
    words = ["+model=llama", "model.path=base", "+trainer=sft", "kernels=[]", "data.path=rows.jsonl", "output_dir=run"]
    words += ["trainer.max_steps=3", "trainer.save_steps=1", "trainer.global_batch=2", "data.template=own.jinja"]
    assert command(words) == 0
    shutil.rmtree("run/checkpoints/checkpoint-3")
    shutil.rmtree("run/trained")
    unfinished("run")
    return in_tmp, words


def unfinished(folder: str) -> None:
    file = Path(folder) / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))


def steps(folder: str) -> list[int]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [entry["step"] for line in lines if "loss" in (entry := json.loads(line))]


def test_the_same_command_goes_on(interrupted, capsys: pytest.CaptureFixture[str]) -> None:
    _, words = interrupted
    before = steps("run")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # cut off by the kill
    assert command(words) == 0
    assert "going on with run after step 2; resume=never starts anew" in capsys.readouterr().out
    assert steps("run") == before == [1, 2, 3]
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"


def test_stopped_after_its_last_step_it_measures_and_exports(interrupted) -> None:
    _, words = interrupted
    assert command(words) == 0
    shutil.rmtree("run/trained")
    unfinished("run")
    assert command(words) == 0
    assert Path("run/trained/adapter_model.safetensors").is_file()
    assert json.loads(Path("run/run.json").read_text())["steps"] == 3


def test_stopped_before_its_first_checkpoint_it_begins_again(interrupted, capsys) -> None:
    _, words = interrupted
    shutil.rmtree("run/checkpoints")
    assert command(words) == 0
    assert "beginning again in run" in capsys.readouterr().out
    assert Path("run/interrupted-1/metrics.jsonl").is_file()
    assert steps("run") == [1, 2, 3]


def test_killed_before_it_said_that_it_began(interrupted, capsys) -> None:
    _, words = interrupted
    shutil.rmtree("run/checkpoints")
    Path("run/run.json").unlink()
    assert command(words) == 0
    assert "beginning again in run" in capsys.readouterr().out


def test_a_config_of_somebody_elses_is_left_alone(interrupted, capsys) -> None:
    _, words = interrupted
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("a: 1")
    assert command([*(w for w in words if not w.startswith("output_dir")), "output_dir=mine"]) == 2
    said = capsys.readouterr().err
    assert "already holds a run (config.yaml)" in said
    assert "resume=last" not in said, "there is nothing to go on from"
    assert Path("mine/config.yaml").read_text() == "a: 1"


def test_without_a_folder_the_newest_of_the_same_command_goes_on(interrupted, capsys) -> None:
    _, words = interrupted
    words = [word for word in words if not word.startswith("output_dir")]
    Path("runs").mkdir()
    for number in ("001", "002"):
        shutil.copytree("run", f"runs/llama-sft-{number}")
    assert command([*words, "trainer.seed=7"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert command(words) == 0
    assert f"going on with {Path('runs/llama-sft-002')}" in capsys.readouterr().out
    assert command([*words, "resume=never"]) == 0
    assert "going on" not in capsys.readouterr().out


CHANGES = {
    "trainer.learning_rate": ["trainer.learning_rate=0.5"],
    "trainer.seed": ["trainer.seed=7"],
    "trainer.global_batch": ["trainer.global_batch=4"],
    "trainer.name": ["+trainer=cpt"],
    "adapter.r": ["adapter.r=4"],
    "data.template": [],
    "data.path": [],
    "model.tokenizer": [],
    "model.weights": [],
    "ftcore": [],
}


def change(key: str, place: Path, how: str = "") -> None:
    if key == "data.template":
        (place / "own.jinja").write_text((place / "own.jinja").read_text() + "{# another #}")
    elif key == "data.path":
        rows = {"order": ROWS[::-1], "length": ROWS[:-1], "bytes": [*ROWS[:-1], ROWS[0]]}[how]
        write_rows(place / "rows.jsonl", rows)
    elif key == "model.tokenizer":
        file = place / "base" / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 77}))
    elif key == "model.weights":
        file = place / "base" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif key == "ftcore":
        file = place / "run" / "run.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "inputs": {**state["inputs"], "ftcore": "17"}}))


@pytest.mark.parametrize(
    ("key", "how"),
    [(key, how) for key in CHANGES for how in (("order", "length", "bytes") if key == "data.path" else ("",))],
)
def test_what_changed_is_named_with_both_values(interrupted, capsys, key: str, how: str) -> None:
    place, words = interrupted
    change(key, place, how)
    if key == "trainer.name":
        words = [word for word in words if word != "+trainer=sft"]
    capsys.readouterr()
    assert command([*words, *CHANGES[key]]) == 2
    said = capsys.readouterr().err
    assert f"{key}: was " in said
    assert " when the run began, and is " in said
    assert not Path("run/trained").exists()


def test_a_change_can_be_accepted(interrupted, capsys) -> None:
    _, words = interrupted
    assert command([*words, "trainer.learning_rate=0.5", "resume.allow=[trainer.learning_rate]"]) == 0
    assert "going on with run" in capsys.readouterr().out


def test_one_writer(interrupted, capsys) -> None:
    _, words = interrupted
    with held(Path("run")):
        assert command(words) == 73
    assert "run is written by another process" in capsys.readouterr().err
    assert command(words) == 0


def test_stopped_after_training_without_a_checkpoint_it_begins_again(interrupted, capsys) -> None:
    """Killed while it exported, with `trainer.save_steps=0`; what it had trained is kept beside."""
    _, words = interrupted
    shutil.rmtree("run/checkpoints")
    Path("run/trained").mkdir()
    assert command(words) == 0
    said = f"beginning again in run: it left no checkpoint; what it left is in {Path('run/interrupted-1')}"
    assert said in capsys.readouterr().out
    assert Path("run/interrupted-1/trained").is_dir()
    assert Path("run/trained/adapter_model.safetensors").is_file()


def test_an_export_that_failed_is_not_trained_again(interrupted, capsys) -> None:
    _, words = interrupted
    shutil.rmtree("run/checkpoints")
    Path("run/trained").mkdir()
    file = Path("run/run.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "failed"}))
    assert command(words) == 2
    assert "run already holds a run" in capsys.readouterr().err


def test_when_every_checkpoint_is_damaged_the_same_command_begins_anew_the_next_time(interrupted, capsys) -> None:
    _, words = interrupted
    for folder in Path("run/checkpoints").iterdir():
        (folder / "random.json").write_text("{}")
    assert command(words) == 66
    assert "leave resume out: the same command then begins anew" in capsys.readouterr().err
    assert command(words) == 0
    assert len(list(Path("run/checkpoints/damaged").iterdir())) == 2


def rates(folder: str) -> dict[int, float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["learning_rate"] for line in lines if "learning_rate" in (entry := json.loads(line))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [(), ("trainer.learning_rate=5e-2",), ("trainer.schedule=cosine",)], ids=["longer", "rate", "schedule"]
)
def test_a_run_that_is_made_longer_goes_on_by_its_new_schedule(in_tmp: Path, changed: tuple[str, ...]) -> None:
    write_rows(in_tmp / "rows.jsonl", ROWS)
    words = ["+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]", "data.path=rows.jsonl", "prompts=[]"]
    words += ["trainer.save_steps=1", "trainer.global_batch=2", "trainer.warmup=0"]
    assert command([*words, "trainer.max_steps=5", "output_dir=whole", *changed]) == 0
    assert command([*words, "trainer.max_steps=2", "output_dir=run"]) == 0
    allow = ",".join(word.partition("=")[0] for word in changed)
    more = ["trainer.max_steps=5", *changed, *([f"resume.allow=[{allow}]"] if allow else [])]
    assert command(["run=run", "output_dir=run", "resume=last", *more]) == 0
    wanted, found = rates("whole"), rates("run")
    assert [found[step] for step in (3, 4, 5)] == [wanted[step] for step in (3, 4, 5)]
    assert min(found.values()) > 0


def test_a_checkpoint_that_a_run_has_gone_on_from_needs_another_folder(interrupted, capsys) -> None:
    _, words = interrupted
    assert command(words) == 0
    kept = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert command(["run=run", "output_dir=run", "resume=run/checkpoints/checkpoint-1"]) == 2
    said = capsys.readouterr().err
    assert "resume: run has gone on from there, to step 3" in said
    assert "another output_dir" in said
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == kept
    assert command(["run=run", "output_dir=other", "resume=run/checkpoints/checkpoint-1"]) == 0
    assert steps("other") == [2, 3]
