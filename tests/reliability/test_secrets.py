"""Eight secrets, six ways in: none is found in anything that a run writes or prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftcore.cli import run as command
from ftcore.composition import compose
from ftcore.errors import Exit, Refused
from ftcore.redaction import HIDDEN, Redacted, is_secret, redact, redacted, without_secrets

# Put together here, so that no scanner takes this file for a leak.
CANARIES = {
    "HF_TOKEN": "hf" + "_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    "OPENAI_API_KEY": "sk" + "-" + "proj-0123456789abcdefABCDEF_9876",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "GITHUB_TOKEN": "gh" + "p_" + "0123456789abcdefghijABCDEFGHIJ012345",
    "AWS_ACCESS_KEY_ID_KEY": "AK" + "IA" + "ABCDEFGHIJKLMNOP",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY",
    "MY_PASSWORD": "correct horse battery",
    "SOME_SECRET": "ab12cd34ef56",
}
PLAIN = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "SOME_SECRET")
"""Those that have no form to know them by: the environment must hold them, or their key must say it."""
WORDS = ["+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=1"]
KEYS = ("hub_token", "api_key", "password", "secret")


@pytest.fixture
def secret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> str:
    """One canary; those without a form are in the environment as well, as a user would have them."""
    name: str = request.param
    for other in CANARIES:
        monkeypatch.delenv(other, raising=False)
    if name in PLAIN:
        monkeypatch.setenv(name, CANARIES[name])
    return CANARIES[name]


each_secret = pytest.mark.parametrize("secret", CANARIES, indirect=True)


def refused(words: list[str], secret: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that refuses the secret, and writes it nowhere."""
    assert command(words) == Exit.CONFIG
    seen = capsys.readouterr()
    assert secret not in seen.out + seen.err
    assert "holds a password or an access token" in seen.err
    assert "HF_TOKEN=" in seen.err
    assert not Path("runs").exists()
    return seen.err


@each_secret
def test_on_the_command_line(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    for key in (*(f"+trainer.args.{key}" for key in KEYS), "+modle", "objective", "trainer.args.hub_model_id"):
        said = refused([*WORDS, f"{key}='{secret}'"], secret, capsys)
        assert said.startswith(f"ftcore: {key.lstrip('+')}: ")
    refused(["-m", *WORDS, f"objective='{secret}'"], secret, capsys)


@each_secret
def test_in_yaml_of_ones_own(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/recipe").mkdir(parents=True)
    for key in (*KEYS, "hub_model_id"):
        text = f"# @package _global_\ntrainer:\n  args:\n    {key}: '{secret}'\n"
        Path("conf/recipe/mine.yaml").write_text(text)
        refused([*WORDS, "+recipe=mine", "--config-dir", "conf"], secret, capsys)


@each_secret
def test_in_an_address(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"https://me:{secret.replace(' ', '')}@example.com/rows.jsonl"
    assert command([*WORDS, f"data.path='{address}'"]) == Exit.CONFIG
    seen = capsys.readouterr()
    assert secret.replace(" ", "") not in seen.out + seen.err
    assert redact(f"cannot open {address}") == f"cannot open https://{HIDDEN}@example.com/rows.jsonl"


@each_secret
def test_in_a_path_or_a_hub_id(secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("data.path", "model.id", "model.path", "output_dir", "+export.hub.repo_id"):
        refused([*WORDS, f"{key}='a/{secret}'"], secret, capsys)


HOOKS = """
import logging, os, ftcore
NAMES = {names!r}
@ftcore.hookimpl
def ftcore_check_plan(plan):
    words = " ".join(os.environ[name] for name in NAMES)
    print("printed:", words)
    logging.getLogger("ftcore.mine").warning("logged: %s", words)
    return []
@ftcore.hookimpl(trylast=True)
def ftcore_export(plan, checkpoint):
    raise RuntimeError("raised: " + " ".join(os.environ[name] for name in NAMES))
"""


@pytest.mark.slow
def test_in_the_environment_and_in_an_error(in_tmp: Path) -> None:
    """A whole run with its exports and a tracker, which ends in a traceback with all of them in it."""
    (in_tmp / "hooks.py").write_text(HOOKS.format(names=list(CANARIES)))
    words = [*WORDS, "plugins=[hooks.py]", "+export=[adapter,safetensors]", "+extra=[tensorboard]", "output_dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "ftcore", *words],
        capture_output=True,
        text=True,
        cwd=in_tmp,
        env={**os.environ, **CANARIES},
        check=False,
        timeout=300,
    )
    assert done.stdout.count(HIDDEN) >= len(CANARIES), "what the hook printed, without the secrets"
    assert "RuntimeError: raised: " + HIDDEN in done.stderr
    assert HIDDEN in (in_tmp / "run" / "run.json").read_text()
    (in_tmp / "out.txt").write_text(done.stdout + done.stderr)
    files = [file for file in in_tmp.rglob("*") if file.is_file()]
    assert len(files) > 15
    for file in files:
        found = [name for name, value in CANARIES.items() if value.encode() in file.read_bytes()]
        assert found == [], file


@pytest.mark.parametrize(
    "text",
    [
        "model.use_cls_token=true",
        "num_memory_tokens: 16",
        "eos_token_id=2 pad_token='<pad>' image_token=<image> new_tokens=[<think>]",
        "token_id cls_token mask_token max_new_tokens=64",
        "the task-force and a risk-averse sk-learn user wrote hf_model and hf_hub_download",
        "data.path=data/en-sk-translation-pairs-2023.jsonl and sk-wikipedia-2024-cleaned-v2",
        "revision=5b0b7a3d9c1e4f60718293a4b5c6d7e8f9012345",
        "https://example.com:8080/a@b and git@github.com:a/b.git and s3://bucket/key",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "monkey=1 keyboard=2 hotkey=3",
    ],
)
def test_no_false_hits(text: str) -> None:
    assert redact(text) == text
    key, _, value = text.partition("=")
    assert not is_secret(key, value)


@pytest.mark.parametrize(
    "key",
    [
        *("proj-" + "ab-cd_" * 8, "ant-api03-" + "aB3_" * 12, "0123456789abcdef" * 2, "aB3" * 16),
        *("or-v1-" + "0123456789abcdef" * 4, "aB3-dE6_gH9" * 2),
    ],
)
def test_keys_that_begin_with_sk_are_found_whole(key: str) -> None:
    assert redact("key sk" + f"-{key}.") == f"key {HIDDEN}."


def test_keys_of_tokens_are_no_secrets() -> None:
    for key in (
        "model.eos_token",
        "use_cls_token",
        "trainer.num_memory_tokens",
        "a.image_token",
        "pad_token",
        "tokens",
    ):
        assert not is_secret(key, "<pad>")
    for key in ("token", "hub_token", "trainer.args.push_to_hub_token", "a.api_key", "wandb_api_key", "db.password"):
        assert is_secret(key, "x")
        assert not is_secret(key, None) and not is_secret(key, "") and not is_secret(key, "null")


def test_short_and_ordinary_values_of_the_environment_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "true")
    monkeypatch.setenv("SSH_KEY", __file__)
    assert redact(f"true {__file__}") == f"true {__file__}"


def test_programs_that_are_started_get_no_secret() -> None:
    given = {**CANARIES, "PATH": "/bin", "PROXY": "http://me:hunter22@proxy:3128", "TOKENIZERS_PARALLELISM": "false"}
    assert without_secrets(given) == {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"}


def test_all_depths_are_redacted() -> None:
    token = CANARIES["HF_TOKEN"]
    assert redacted({"a": [{"b": f"x {token}"}, 1, None], token: (token,)}) == {
        "a": [{"b": f"x {HIDDEN}"}, 1, None],
        HIDDEN: [HIDDEN],
    }


def test_a_stream_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Redacted(sys.stdout)
    assert stream.write("a") == 1
    print(f"b {CANARIES['HF_TOKEN']}", file=stream)  # type: ignore[call-overload]
    stream.writelines(["c\n", CANARIES["GITHUB_TOKEN"]])
    assert capsys.readouterr().out == f"ab {HIDDEN}\nc\n{HIDDEN}"
    assert stream.isatty() == sys.stdout.isatty()


def test_a_key_of_the_hub_is_never_a_setting() -> None:
    with pytest.raises(Refused, match="hub_token: holds a password or an access token"):
        compose(["+model=llama", "+trainer=sft", "trainer.args={hub_token: x}"])
