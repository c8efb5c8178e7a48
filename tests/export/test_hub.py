"""Pushes to the hub by the real client, against a small hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, Hub, asked_instead, served

import ftcore
from ftcore.testing import runs

RUN = ("+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=2", "trainer.global_batch=4")
SHORT = ("trainer.max_length=160", "trainer.learning_rate=5e-3", "sampling.max_new_tokens=4", "prompts=[hello]")
EXPORTS = ("+export=[safetensors,adapter]", "export.safetensors.verify=false", "export.adapter.verify=false")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served() as made:
        asked_instead(made, monkeypatch)
        yield made


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with both usual exports."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    ftcore.run([*RUN, *SHORT, *EXPORTS, f"output_dir='{folder}'"])
    return folder


def words_for(run: Path, *words: str) -> list[str]:
    return [f"run={run}", "+export=[hub]", "export.hub.repo_id=me/pebble", *words]


def push(run: Path, *words: str) -> None:
    from ftcore.tasks.export import main

    assert main(words_for(run, *words)) == 0


def front(card: str) -> dict[str, object]:
    """The fields in front of a card."""
    found = yaml.safe_load(card.split("---")[1])
    assert isinstance(found, dict)
    return found


def test_the_merged_model_and_its_card_go_in_one_commit(
    hub: Hub, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run_folder)
    assert hub.repos == {"me/pebble": {"private": True}}
    (commit,) = hub.commits
    assert commit["branch"] == "main"
    sent, source = hub.files(), run_folder / "export" / "safetensors"
    assert sent.keys() - {"README.md"} == {file.name for file in source.iterdir()}
    assert all(sent[file.name] == file.read_bytes() for file in source.iterdir())
    card = sent["README.md"].decode()
    assert card == (run_folder / "export" / "hub" / "README.md").read_text(encoding="utf-8")
    assert front(card)["license"] == "unknown"
    assert front(card)["library_name"] == "transformers"
    shown = ("| trainer | sft |", "| shape of the rows | messages |", "| max_steps | 2 |", "| loss |", "me/pebble")
    assert [text for text in shown if text not in card] == []
    assert "me/pebble/commit/" in capsys.readouterr().out


def test_an_adapter_names_its_base_and_no_folder_of_this_machine(hub: Hub, run_folder: Path) -> None:
    push(run_folder, "export.hub.what=adapter", "export.hub.license=apache-2.0", "export.hub.revision=trial")
    assert hub.branches == ["trial"]
    assert hub.commits[0]["branch"] == "trial"
    sent = hub.files()
    local = json.loads((run_folder / "export" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = Path(local["base_model_name_or_path"])
    assert base.is_dir()
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == base.name
    assert not [path for path, content in sent.items() if str(Path.home()).encode() in content]
    card = sent["README.md"].decode()
    assert front(card)["license"] == "apache-2.0"
    assert front(card)["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in card


@pytest.mark.parametrize("what", ["safetensors", "adapter"])
@pytest.mark.parametrize(
    ("words", "model", "inputs"),
    [
        ("+model=llama +trainer=sft", "ForCausalLM", "Tokenizer"),
        ("+model=bert +trainer=classify", "ForSequenceClassification", "Tokenizer"),
        ("+model=llama +trainer=reward", "ForSequenceClassification", "Tokenizer"),
        ("+model=bert +trainer=embed", "BertModel", "Tokenizer"),
        ("+model=gemma3_vision +trainer=sft data=images", "ForConditionalGeneration", "Processor"),
        ("+model=whisper +trainer=speech", "ForConditionalGeneration", "Whisper"),
    ],
)
def test_the_code_of_a_card_loads_what_was_trained(
    what: str, words: str, model: str, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcore import checkpoint, pipeline
    from ftcore_exporters._card import card

    verify = f"export.{what}.verify=false"
    hooks, plan = runs.prepared([*words.split(), "model.tiny=true", f"+export=[{what}]", verify,
                                 f"output_dir='{tmp_path}'"])  # fmt: skip
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    (artifact,) = pipeline.export(hooks, loaded)
    text = card(plan, what, artifact.path, str(artifact.path), None)
    monkeypatch.chdir(Path(checkpoint.locate(plan.run.model, plan.family)).parent)  # where a base's name is a folder
    found: dict[str, object] = {}
    exec(text.split("```python")[1].split("```")[0], found)
    base = found["model"] if what == "safetensors" else found["model"].get_base_model()  # type: ignore[attr-defined]
    assert type(base).__name__.endswith(model)
    named = found.get("processor") or found.get("feature_extractor") or found["tokenizer"]
    assert inputs in type(named).__name__ or (inputs == "Tokenizer" and named is found["tokenizer"])


def test_a_gguf_is_loaded_by_llama_cpp_alone(tmp_path: Path) -> None:
    from ftcore_exporters._card import card

    _, plan = runs.prepared([*RUN[:2], f"output_dir='{tmp_path}'"])
    text = card(plan, "gguf", tmp_path, "me/pebble", None)
    assert "llama-server -hf me/pebble" in text
    assert "```python" not in text


def test_the_token_is_written_nowhere(
    hub: Hub, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run_folder)
    kept = [file for file in run_folder.rglob("*") if file.is_file()]
    assert run_folder / "run.json" in kept
    assert not [file for file in kept if TOKEN.encode() in file.read_bytes()]
    assert not [path for path, content in hub.files().items() if TOKEN.encode() in content]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err


def test_a_hub_that_fails_for_a_while_is_asked_again(hub: Hub, run_folder: Path) -> None:
    hub.failures = 1
    push(run_folder)
    assert hub.failures == 0
    assert len(hub.commits) == 1


def test_a_token_that_may_not_write_is_said(hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ftcore.Refused, match=r"does not let this token write to me/pebble \(401\)") as refused:
        push(run_folder)
    assert "hf_wrong" not in refused.value.text()
    assert not hub.commits


def test_a_public_repository_is_not_pushed_to_unasked(hub: Hub, run_folder: Path) -> None:
    hub.repos["me/pebble"] = {"private": False}
    with pytest.raises(ftcore.Refused, match="me/pebble is there and is public"):
        push(run_folder)
    assert not hub.commits
    push(run_folder, "export.hub.private=false")
    assert len(hub.commits) == 1


def test_it_comes_after_the_exports_that_it_pushes(hub: Hub, tmp_path: Path) -> None:
    from ftcore import pipeline

    words = ["+export=[hub,safetensors]", "export.hub.repo_id=me/new", "export.safetensors.verify=false"]
    hooks, plan = runs.prepared([*RUN[:2], *words, f"output_dir='{tmp_path}'"])
    artifacts = pipeline.export(hooks, pipeline.load(hooks, plan))
    assert [artifact.target for artifact in artifacts] == ["hub", "safetensors"]
    assert "model.safetensors" in hub.files()


@pytest.mark.slow
def test_a_hub_that_keeps_failing_ends_in_one_message(hub: Hub, run_folder: Path, tmp_path: Path) -> None:
    """By the command line, in a process that knows of the hub by its environment alone."""
    hub.failures = 1000
    before = sorted(run_folder.rglob("*"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "ftcore", "export", *words_for(run_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 74
    assert "export.hub: the hub answered 503, 3 times" in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert sorted(run_folder.rglob("*")) == before


def test_a_hub_that_is_not_there_is_said(hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("ftcore_exporters._hub_push.WAIT", 0.0)
    with pytest.raises(ftcore.Refused, match="the hub cannot be reached"):
        push(run_folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.hub.repo_id=''"], "'' is no name of a repository"),
        (["export.hub.repo_id=pebble"], "'pebble' is no name of a repository"),
        (["export.hub.repo_id=me/../pebble"], "is no name of a repository"),
        (["export.hub.repo_id=me/.."], "is no name of a repository"),
        (["export.hub.repo_id=me/peb--ble"], "is no name of a repository"),
        (["export.hub.revision=../main"], "'../main' is no name of a branch"),
        (["export.hub.what=safetensor"], "there is no export 'safetensor'"),
        (["export.hub.what=../../trained"], "there is no export '../../trained'"),
        (["export.hub.what=bnb4"], "the run has no export 'bnb4'"),
        ([], "there is nothing to push"),
        ([], "there is no token to push with"),
        ([], "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    repo = [] if any("repo_id" in word for word in words) else ["export.hub.repo_id=me/pebble"]
    found = runs.refusals([*RUN[:2], "+export=[hub]", *repo, *words, f"output_dir='{tmp_path}'"])
    assert any(said in problem.message for problem in found), [problem.message for problem in found]
