"""A virtual environment for trying an installed package, without downloading anything."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class Environment:
    """A new virtual environment that also sees every package of the running one.

    `install` puts packages into it, and `ftcore` and `python` run there in processes of their own, so that a test sees
    what a user sees after `pip install`.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
        # `addsitedir` and not a bare path: editable installs of the running environment are .pth files themselves.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in _own_packages()]
        (self.packages / "_outer.pth").write_text("".join(lines), encoding="utf-8")

    def install(self, *projects: Path) -> None:
        """Install project folders or wheels with pip, offline and without their dependencies."""
        command = [sys.executable, "-m", "pip", "--python", str(self.interpreter), "install", "--quiet"]
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, *options, *(str(project.resolve()) for project in projects)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"pip could not install {', '.join(map(str, projects))}:\n{done.stdout}{done.stderr}")

    def python(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the environment's interpreter."""
        return subprocess.run([str(self.interpreter), *words], capture_output=True, text=True, check=False, cwd=cwd)

    def ftcore(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run ftcore's command line in the environment."""
        return self.python("-m", "ftcore", *words, cwd=cwd)


def _own_packages() -> list[str]:
    """Folders that the running environment finds its packages in."""
    return [
        folder
        for folder in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib")])
        if Path(folder).is_dir()
    ]
