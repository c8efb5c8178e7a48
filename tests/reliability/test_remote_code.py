"""Python files in model repositories are never run, whatever their JSON says and whatever is answered to a question."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftcore import checkpoint, pipeline, vocabulary
from ftcore import hooks as h
from ftcore.cli import run as command
from ftcore.composition import compose, typed
from ftcore.defaults.model import _loaded
from ftcore.errors import Refused

EVIL = "import os\nopen(os.environ['CANARY'], 'a').write(__file__ + '\\n')\nclass {name}:\n    pass\n"
MAPS: dict[str, dict[str, Any]] = {
    "config.json": {
        "AutoConfig": "evil_config.Evil",
        "AutoModel": "evil_model.Evil",
        "AutoModelForCausalLM": "evil_model.Evil",
        "AutoTokenizer": ["evil_tokenizer.Evil", "evil_tokenizer.Evil"],
    },
    "tokenizer_config.json": {"AutoTokenizer": ["evil_tokenizer.Evil", "evil_tokenizer.Evil"]},
    "processor_config.json": {"AutoProcessor": "evil_processor.Evil"},
    "preprocessor_config.json": {
        "AutoImageProcessor": "evil_processor.Evil",
        "AutoFeatureExtractor": "evil_processor.Evil",
    },
    "generation_config.json": {"AutoGeneration": "evil_generate.Evil"},
    "video_preprocessor_config.json": {"AutoVideoProcessor": "evil_processor.Evil"},
}
KEYS = {"model_file": "evil_model.py", "custom_generate": ".", "trust_remote_code": True}
FILES = (
    "evil_config",
    "evil_model",
    "evil_tokenizer",
    "evil_processor",
    "evil_generate",
    "modeling_llama",
    "sitecustomize",
)
WORDS = ["+trainer=sft", "trainer.max_steps=1", "+model=llama"]


@pytest.fixture
def repository(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose files name code of the repository in every way that transformers knows."""
    import shutil

    from ftcore.catalog import installed
    from ftcore.manager import Hooks

    run = typed(compose(["+model=llama", "model.tiny=true"]))
    assert run.model is not None
    family = Hooks.for_run(run, installed()).first(h.ftcore_model_family, config=run.model)
    folder = in_tmp / "repository"
    shutil.copytree(checkpoint.locate(run.model, family), folder)
    for name, auto_map in MAPS.items():
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**content, "auto_map": auto_map, **KEYS}))
    for name in FILES:
        (folder / f"{name}.py").write_text(EVIL.format(name="Evil"))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        EVIL.format(name="Evil") + "\ndef generate(**_):\n    pass\n"
    )
    (folder / "custom_generate" / "requirements.txt").write_text("torch\n")
    monkeypatch.setenv("CANARY", str(in_tmp / "canary"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(in_tmp / "modules"))
    return folder


def unknown(folder: Path, file: str, **keys: Any) -> None:
    """Let the repository need code of its own: transformers has no class of that name."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **keys}))


def test_a_model_is_loaded_by_the_library_alone(repository: Path) -> None:
    run = typed(compose([*WORDS, f"model.path={repository}"]))
    hooks, plan = pipeline.prepare(run)
    loaded = pipeline.load(hooks, plan)
    assert run.model is not None
    checkpoint.config_of(run.model, plan.family)
    vocabulary.own_tokenizer(plan)
    ids = loaded.tokenizer("Hi", return_tensors="pt")["input_ids"]
    loaded.model.generate(input_ids=ids, max_new_tokens=2)
    assert type(loaded.model.get_base_model()).__module__ == "transformers.models.llama.modeling_llama"
    assert not Path("canary").exists()
    assert not Path("modules").exists()


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ("config.json", {"model_type": "evil"}, "is a 'evil' checkpoint, but llama takes llama"),
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "needs Python code of its own"),
    ],
)
def test_what_cannot_be_loaded_without_its_code_is_refused(
    repository: Path, file: str, keys: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody is asked: transformers would take the answer of whoever sits there, or a pipe's."""
    unknown(repository, file, **keys)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if file == "tokenizer_config.json":
        (repository / "tokenizer.json").unlink()
    run = typed(compose([*WORDS, f"model.path={repository}"]))
    with pytest.raises(Refused, match=said):
        pipeline.load(*pipeline.prepare(run))
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        OSError("We couldn't connect to the hub to load owner/model-safetensors"),
    ],
)
def test_a_full_disk_or_a_hub_that_is_down_is_not_called_a_pickle(error: OSError) -> None:
    def from_pretrained(place: str, **options: Any) -> None:
        raise error

    with pytest.raises(OSError, match="safetensors") as raised:
        _loaded(SimpleNamespace(from_pretrained=from_pretrained), "owner/model-safetensors", {})
    assert raised.value is error


@pytest.mark.parametrize(
    "words",
    [
        ["+model.trust_remote_code=true"],
        ["+trust_remote_code=true"],
        ["trainer.args={trust_remote_code: true}"],
        ["trainer.args={model_init_kwargs: {trust_remote_code: true}}"],
        ["+security.remote_code=true"],
        ["+security.remote_code=a/b@main"],
    ],
)
def test_no_setting_turns_it_on(words: list[str], in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", *WORDS, "model.tiny=true", *words]) == 2
    assert capsys.readouterr().err.startswith("ftcore: ")


TASKS = (
    ["plan"],
    ["preview"],
    ["train", "+export=[adapter,safetensors]", "output_dir=run", "data.eval_size=2"],
    ["eval", "run=run"],
    ["chat", "run=run"],
    ["export", "run=run", "+export=[safetensors]", "output_dir=again"],
)


@pytest.mark.slow
def test_no_task_runs_it(repository: Path, in_tmp: Path) -> None:
    """As a user would, with `y` for every question."""
    for task, *words in TASKS:
        own = [] if "run=run" in words else [*WORDS, f"model.path={repository}"]
        done = subprocess.run(
            [sys.executable, "-m", "ftcore", task, *own, *words],
            input="y\n" * 20,
            capture_output=True,
            text=True,
            cwd=in_tmp,
            env=dict(os.environ),
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{task}: {done.stderr[-2000:]}"
        assert "run the custom code" not in done.stdout + done.stderr
        assert not Path("canary").exists(), task
