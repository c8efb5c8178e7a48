"""A built wheel, installed in a clean environment, behaves like the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and this environment's libraries but not its editable install."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path in a .pth is added as it is: the .pth files inside it, such as that of the editable install, are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "-m", "ftcore", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


def test_it_holds_all_packages_samples_and_yaml(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "ftcore/hooks.py",
        "ftcore_data/samples/messages.jsonl",
        "ftcore_conf/ftcore.yaml",
        "ftcore_kernels/ops/rope.py",
    ):
        assert name in names
    roots = {name.split("/")[0] for name in names}
    assert not roots & {"tests", "docs", "plugins", "kernels", "conf"}


def test_it_trains(clean_python: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [clean_python, "-c", "import ftcore; print(ftcore.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert str(ROOT) not in where.stdout
    listed = run(clean_python, "plugins", cwd=tmp_path)
    here = subprocess.run(
        [sys.executable, "-m", "ftcore", "plugins"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert listed.stdout == here.stdout
    done = run(
        clean_python,
        "+model=smollm2",
        "model.tiny=true",
        "+trainer=sft",
        "trainer.max_steps=1",
        "+export=[adapter]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/smollm2-sft-001/export/adapter/adapter_model.safetensors").is_file()
