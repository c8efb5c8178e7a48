"""What the tests of the docs share: an environment in which `ftcore` needs no imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WARM = Path(__file__).parent / "warm.py"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Variables for the commands of the docs: offline, and with a fast `ftcore` on the PATH (see warm.py)."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "FTCORE_DOCS_PYTHON": sys.executable}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables["OMP_NUM_THREADS"] = "1"  # tiny models: threads cost more than they bring
    if os.environ.get("FTCORE_DOCS_COLD") or sys.platform == "win32":
        yield variables
        return
    folder = tmp_path_factory.mktemp("warm")
    command = folder / "ftcore"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{WARM}" ftcore "$@"\n')
    command.chmod(0o755)
    variables["FTCORE_DOCS_SOCKET"] = str(folder / "socket")
    variables["FTCORE_DOCS_PYTHON"] = f"{sys.executable}|-S|{WARM}|script"
    variables["PATH"] = os.pathsep.join([str(folder), variables["PATH"]])
    serve = [sys.executable, str(WARM), "serve", variables["FTCORE_DOCS_SOCKET"]]
    server = subprocess.Popen(serve, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield variables
    finally:
        server.kill()
        server.wait()
