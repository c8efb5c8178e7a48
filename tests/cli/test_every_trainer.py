"""Every installed trainer by the command line, as a newcomer tries it: a tiny model, the shipped rows, nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from ftcore.catalog import installed
from ftcore.cli import run

STEPS = 3
OWN_MODEL = {"speech": "whisper", "tts": "csm"}
"""Trainers that train no text model, and the family that they are for."""
LONG_ROWS = {"cpt"}
"""Whole documents, eight a step: four times as long as any other."""
TRAINERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG_ROWS else []) for name in installed().names("trainer")
]
STEP = re.compile(rf"^step (\d)/{STEPS}  loss (\S+)(?: reward (\S+))?  \d+\.\d\d s/step$", re.MULTILINE)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_in_an_empty_folder(trainer: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = OWN_MODEL.get(trainer, "qwen3")
    code = run([f"+model={model}", "model.tiny=true", f"+trainer={trainer}", f"trainer.max_steps={STEPS}"])
    said = capsys.readouterr()
    assert code == 0, said.err
    # Libraries that another test imported write their bars here all the same; test_cli.py wants nothing of a process.
    assert not re.search(r"^ftcore:|Traceback", said.err, re.MULTILINE), said.err
    steps = STEP.findall(said.out)
    assert [int(step) for step, _, _ in steps] == list(range(1, STEPS + 1)), said.out
    assert all(math.isfinite(float(number)) for _, *numbers in steps for number in numbers if number)
    for line in ("kernels: reference.", "\nResult\n  loss_first ", "\n  loss_last ", "\nWritten\n  trained  "):
        assert line in said.out, said.out
    assert "inside a layer" not in said.out, "a whole layer's kernel is no kernel less"
    assert "nan" not in re.findall(r"\w+", said.out)

    (folder,) = (in_tmp / "runs").iterdir()
    assert [path.name for path in in_tmp.iterdir()] == ["runs"]
    assert f"run folder: runs/{folder.name}\n" in said.out
    assert f"trained  runs/{folder.name}/trained" in said.out
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "done"
    assert (folder / "trained" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("trainer", OWN_MODEL)
def test_another_family_is_answered_with_the_one_to_use(
    trainer: str, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["+model=qwen3", "model.tiny=true", f"+trainer={trainer}"]) == 2
    said = capsys.readouterr()
    head = {"speech": "AutoModelForSpeechSeq2Seq", "tts": "AutoModelForTextToWaveform"}[trainer]
    assert said.err == (
        f"ftcore: trainer: transformers has no {head} of qwen3, which {trainer} needs\n"
        f"    fix: use +model={OWN_MODEL[trainer]}\n"
    )
    assert list(in_tmp.iterdir()) == [], "no run folder of a refused run"
