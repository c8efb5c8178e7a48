"""What Windows and Colab need, as far as it can be tested on Linux."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PureWindowsPath

import pytest

from ftcore.errors import Exit, Refused
from ftcore.rows import local_files

ROOT = Path(__file__).parents[2]
SOURCES = [f for root in ("ftcore", "plugins", "kernels", "conf") for f in (ROOT / root).rglob("*.py")]
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty", "crypt", "syslog"}


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_nothing_posix_only_is_imported_with_a_module() -> None:
    for file in SOURCES:
        assert not imports(ast.parse(file.read_text(encoding="utf-8"))) & POSIX_ONLY, file


def test_files_are_opened_with_an_encoding() -> None:
    """Windows would take the code page of the country."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("read_text", "write_text")
            ):
                assert any(k.arg == "encoding" for k in node.keywords), f"{file}:{node.lineno}"


def test_no_file_has_a_name_that_windows_refuses() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    reserved = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")
    for name in filter(None, tracked):
        assert not re.search(r'[<>:"\\|?*]', name), name
        assert not any(reserved.match(part) for part in name.split("/")), name
    assert len({name.lower() for name in tracked}) == len(tracked), "two names differ in case only"


def test_windows_paths_are_files_and_not_hub_ids() -> None:
    for path in (PureWindowsPath("C:/rows/my.jsonl"), PureWindowsPath("data\\rows"), PureWindowsPath("..\\x")):
        with pytest.raises(Refused) as refused:
            local_files(str(path))
        assert refused.value.code == Exit.MISSING_INPUT


def test_triton_is_asked_for_on_linux_only() -> None:
    (triton,) = [
        d for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if "triton" in d
    ]
    assert "sys_platform == 'linux'" in triton


def test_it_runs_without_triton(tmp_path: Path) -> None:
    """The automatic kernel set falls back to plain PyTorch, and asking for Triton by name is answered."""
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name.partition('.')[0] == 'triton' else find(name, package)\n"
        "import ftcore.cli\n"
        "sys.exit(ftcore.cli.run(sys.argv[1:]))\n"
    )
    words = ["plan", "+model=qwen3", "model.tiny=true", "+trainer=sft"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "reference.decoder_layer" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "kernels=[triton]"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "triton is not installed" in done.stderr


@pytest.mark.slow
def test_workers_can_be_spawned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS start data-loading workers anew, so all that they need must be picklable."""
    import ftcore

    monkeypatch.chdir(tmp_path)
    words = [
        "+model=qwen3",
        "model.tiny=true",
        "+trainer=sft",
        "trainer.max_steps=2",
        "prompts=[Hi]",
        "sampling.max_new_tokens=1",
    ]
    loader = ["trainer.args.dataloader_num_workers=1", "trainer.args.dataloader_multiprocessing_context=spawn"]
    spawned = ftcore.run([*words, "output_dir=spawned", *loader])
    assert spawned.metrics["loss_last"] == ftcore.run([*words, "output_dir=plain"]).metrics["loss_last"]
