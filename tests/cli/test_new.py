"""`ftcore new`: for every kind it writes a package that installs, and whose own tests pass."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftcore.config import KINDS
from ftcore.errors import Refused
from ftcore.manager import import_plugin
from ftcore.tasks import new
from ftcore.testing import Environment


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of every kind."""
    folder = tmp_path_factory.mktemp("new")
    for kind in KINDS:
        new.write_package(kind, f"my_{kind}", folder)
    return folder


@pytest.fixture(scope="module")
def environment(written: Path) -> Environment:
    """An environment with all of them installed."""
    made = Environment(written / "venv")
    made.install(*(written / f"ftcore-my_{kind}" for kind in KINDS))
    return made


@pytest.fixture(scope="module")
def outcomes(written: Path, environment: Environment) -> dict[str, Counter[str]]:
    """Kind to the number of its tests that passed and failed; one process, since importing torch takes seconds."""
    tests = [str(written / f"ftcore-my_{kind}" / "tests") for kind in KINDS]
    options = ["-rA", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={written}"]
    done = environment.python("-m", "pytest", *options, *tests, cwd=written)
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for outcome, kind in re.findall(r"^(PASSED|FAILED|ERROR) ftcore-my_(\w+)/", done.stdout, re.M):
        found[kind][outcome] += 1
    assert done.returncode in (0, 1), done.stdout + done.stderr
    sys.stdout.write(done.stdout)  # shown by pytest when a test below fails
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass(kind: str, outcomes: dict[str, Counter[str]]) -> None:
    assert set(outcomes[kind]) == {"PASSED"}
    assert outcomes[kind]["PASSED"] >= 8, "the contract has more tests than that"


def test_all_of_them_are_listed_with_what_they_are(environment: Environment) -> None:
    listed = environment.ftcore("plugins").stdout
    for kind in KINDS:
        assert re.search(rf"^ *{kind} +my_{kind} +ftcore-my_{kind} 0\.1\.0 +[A-Z0-9]", listed, re.M), listed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_of_the_readme_works(kind: str, written: Path, environment: Environment, tmp_path: Path) -> None:
    """As a person would type it, quotes included."""
    command = (
        (written / f"ftcore-my_{kind}" / "README.md")
        .read_text()
        .partition("nothing is downloaded:\n")[2]
        .splitlines()[0]
    )
    assert command == new.TRY[kind].format(name=f"my_{kind}")
    words = [word.strip("'") for word in command.split()]
    assert words[0] == "ftcore"
    done = environment.ftcore(*words[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_style_is_ftcores_own(kind: str, written: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--isolated",
        "--line-length=120",
        "--select=E,F,I,W,B,UP,SIM,C4",
    ]
    # In the package's own folder, as its author would: that decides which imports are of the package itself.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=written / f"ftcore-my_{kind}")
    assert done.returncode == 0, done.stdout


def test_command_line_writes_and_says_what_is_next(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new.main(["reward/manners", "--into", "plugins"]) == 0
    written = {str(path.relative_to("plugins")) for path in Path("plugins").rglob("*") if path.is_file()}
    assert written == {
        f"ftcore-manners/{name}"
        for name in (
            "README.md",
            "pyproject.toml",
            "ftcore_manners/__init__.py",
            "ftcore_manners/py.typed",
            "tests/test_plugin.py",
        )
    }
    shown = capsys.readouterr().out
    assert "cd plugins/ftcore-manners" in shown
    assert "pip install -e '.[test]'" in shown
    assert "'+reward=[manners]'" in shown


@pytest.mark.parametrize(
    ("what", "problem", "fix"),
    [
        ("exporter/numpy", "'exporter' is no kind of plugin", "did you mean export/numpy?"),
        ("thing/numpy", "'thing' is no kind of plugin", "kinds: model, quantizer, "),
        ("export", "names no plugin", "write ftcore new export/NAME"),
        ("export/", "names no plugin", "write ftcore new export/NAME"),
        (
            "export/my-numpy",
            "'my-numpy' cannot be the name of a Python package",
            "use lower-case letters, digits and underscores",
        ),
        ("export/3d", "'3d' cannot be the name of a Python package", "use lower-case letters, digits and underscores"),
        (
            "export/MyNumpy",
            "'MyNumpy' cannot be the name of a Python package",
            "use lower-case letters, digits and underscores",
        ),
        (
            "export/class",
            "'class' cannot be the name of a Python package",
            "use lower-case letters, digits and underscores",
        ),
        (
            "export/../up",
            "'../up' cannot be the name of a Python package",
            "use lower-case letters, digits and underscores",
        ),
        ("export/adapter", "the name is taken by ftcore", "choose another name"),
        ("export/trainers", "a package ftcore_trainers is installed already", "choose another name"),
    ],
)
def test_what_cannot_be_is_refused(what: str, problem: str, fix: str, in_tmp: Path) -> None:
    with pytest.raises(Refused) as refused:
        new.main([what])
    message = str(refused.value)
    assert message.startswith(f"{what}: {problem}")
    assert f"fix: {fix}" in message
    assert list(in_tmp.iterdir()) == []


def test_an_existing_folder_is_left_alone(in_tmp: Path) -> None:
    kept = in_tmp / "ftcore-numpy" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(Refused, match="ftcore-numpy exists already"):
        new.main(["export/numpy"])
    assert [path.name for path in in_tmp.rglob("*")] == ["ftcore-numpy", "mine.txt"]


def test_one_word_of_the_shell(ftcore_cli, in_tmp: Path) -> None:  # type: ignore[no-untyped-def]
    """Through the real command line, where errors end with exit code 2 and no traceback."""
    assert ftcore_cli("new", "extra/diary").returncode == 0
    assert (in_tmp / "ftcore-diary" / "pyproject.toml").is_file()
    again = ftcore_cli("new", "extra/diary")
    assert again.returncode == 2
    assert again.stderr.startswith("ftcore: extra/diary: ftcore-diary exists already")


@pytest.mark.parametrize("name", ["variety", "config", "text_of"])
def test_a_reward_may_be_called_like_what_it_uses(name: str, tmp_path: Path) -> None:
    folder = new.write_package("reward", name, tmp_path)
    module = import_plugin(str(folder / f"ftcore_{name}" / "__init__.py"), "plugins")
    plan = SimpleNamespace(config=lambda cls: cls(name=name, weight=2.0))
    (reward,) = module.ftcore_rewards(plan)
    assert reward.__name__ == name
    assert reward(completions=["one two", [{"role": "assistant", "content": "one One"}]]) == [2.0, 1.0]
