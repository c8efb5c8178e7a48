"""No file that is read can run code: no pickle, no eval, no remote code, no shell, anywhere in the packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [file for part in ("ftcore", "plugins", "kernels", "conf") for file in sorted((ROOT / part).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "hydra.utils.instantiate", "instantiate"),
}


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            if name_of(node.func) in CALLS:
                yield f"calls {name_of(node.func)}"
            for word in node.keywords:
                on = not (isinstance(word.value, ast.Constant) and word.value.value in (False, None))
                if word.arg in ("trust_remote_code", "allow_pickle", "shell") and on:
                    yield f"sets {word.arg}"


def test_nothing_read_is_run() -> None:
    assert len(FILES) > 200
    found = {str(file.relative_to(ROOT)): list(findings(file.read_text())) for file in FILES}
    assert {file: what for file, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "yaml.load(t)",
        "eval(x)",
        "f(trust_remote_code=True)",
        "np.load(f, allow_pickle=flag)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_each_is_found(source: str) -> None:
    assert list(findings(source))
