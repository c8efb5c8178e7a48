"""No file that is read can run code: no pickle, no eval, no remote code, no shell, anywhere in the packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [file for part in ("ftcore", "plugins", "kernels", "conf") for file in sorted((ROOT / part).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
STARTS = {"run", "Popen", "call", "check_call", "check_output", "getoutput"}
"""Functions of subprocess."""
LOADERS = {"from_pretrained"}
OWN_CLASSES = ("Whisper", "Encodec", "Peft", "GenerationConfig", "SNAC", "image_processor")
"""Classes of libraries that know no code of repositories."""
ONLY_IN = {
    "urllib.request": ("ftcore/fetched.py",),
    "socket": ("ftcore/testing/", "plugins/ftcore_extras/"),
    "subprocess": (
        "ftcore/llama_cpp/process.py",
        "ftcore/testing/",
        "plugins/ftcore_exporters/_engine.py",
        "plugins/ftcore_exporters/gguf/workers.py",
    ),
    "jinja2": ("ftcore/template_sandbox.py", "ftcore/template_counts.py", "ftcore/template_limits.py"),
    "ctypes": ("ftcore/llama_cpp/", "ftcore/testing/faults/", "plugins/ftcore_exporters/gguf/writing.py"),
    **dict.fromkeys(("pty", "requests", "httpx", "ftplib", "telnetlib", "xmlrpc", "zipfile", "tarfile"), ()),
}
"""Modules that reach out of the process, and the files that may import them; TemplateError is no way out."""
CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "os.spawnv", "os.execv", "os.execvp", "os.execvpe", "hydra.utils.instantiate"),
    *("instantiate", "tempfile.mktemp", "shutil.unpack_archive", "runpy.run_path", "code.interact", "input"),
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
            yield from _start(node)
            for word in node.keywords:
                on = not (isinstance(word.value, ast.Constant) and word.value.value in (False, None))
                if word.arg in ("trust_remote_code", "allow_pickle", "shell") and on:
                    yield f"sets {word.arg}"


def _start(node: ast.Call) -> Iterator[str]:
    """What is wrong with a call that starts a program, or loads a model."""
    name, words = name_of(node.func), {word.arg: word.value for word in node.keywords}
    if name.startswith("subprocess.") and name.split(".")[1] in STARTS:
        if isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
            yield "starts a program by a text"
        if "env" not in words:
            yield "starts a program with all of the environment"
        if "timeout" not in words and name != "subprocess.Popen":
            yield "starts a program without a timeout"
    if isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
        whose = ast.unparse(node.func.value)
        if not any(known in whose for known in OWN_CLASSES) and "trust_remote_code" not in words:
            yield f"loads by {whose} without trust_remote_code=False"
    if isinstance(node.func, ast.Attribute) and node.func.attr == "apply_chat_template":
        yield "renders a chat template without limits"
    if name.endswith("chmod") and any(
        isinstance(a, ast.Constant) and isinstance(a.value, int) and a.value & 0o022 for a in node.args
    ):
        yield "lets others write"


def reaches(source: str) -> Iterator[str]:
    """Modules that a file imports of those that reach out."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
            if node.module == "jinja2" and all(a.name in ("TemplateError", "TemplateSyntaxError") for a in node.names):
                continue
        for module in ONLY_IN:
            if any(f"{name}.".startswith(f"{module}.") for name in names):
                yield module


def test_only_named_files_reach_out() -> None:
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        for module in reaches(file.read_text()):
            assert any(path.startswith(known) for known in ONLY_IN[module]), f"{path} imports {module}"


def test_nothing_read_is_run() -> None:
    assert len(FILES) > 200
    # ftcore.testing starts interpreters of its own for tests, with their environment.
    files = [file for file in FILES if "testing" not in file.parts]
    found = {str(file.relative_to(ROOT)): list(findings(file.read_text())) for file in files}
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
        "subprocess.run(f'ls {x}', env=e, timeout=1)",
        "subprocess.run([x], timeout=1)",
        "subprocess.run([x], env=e)",
        "subprocess.Popen([x])",
        "os.execvp(x, [])",
        "AutoModel.from_pretrained(x)",
        "loader.from_pretrained(x, trust_remote_code=True)",
        "tokenizer.apply_chat_template(x)",
        "path.chmod(0o777)",
        "input()",
    ],
)
def test_each_is_found(source: str) -> None:
    assert list(findings(source))
