"""Holes that others of this field had, one test for each, named after it: ftcore has none of their kind."""

from __future__ import annotations

import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from template_attacks import INJECTIONS, TALK
from test_no_code import FILES, ROOT, findings

from ftcore import checkpoint, config_guard, pipeline
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.chat import render
from ftcore.cli import run as command
from ftcore.composition import compose, typed
from ftcore.config import ModelConfig
from ftcore.errors import Exit, Refused
from ftcore.llama_cpp import LlamaCpp
from ftcore.llama_cpp import installed as llama_cpp_installed
from ftcore.media import Reach, reaching
from ftcore.paths import safe_join
from ftcore.safetensors_file import read_weights
from ftcore.specs import ModelFamily
from ftcore.training_checkpoint import manifest, store, tree

TINY = ["+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=1"]
FAMILY = ModelFamily(model_types=("llama",), roles=(), lora_targets=(), tiny={})


class Evil:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._file, "w")


def pickled(file: Path, canary: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Evil(canary)))


def sources() -> list[tuple[str, str]]:
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in FILES]


def test_cve_2025_23304_nemo_metadata_of_an_artefact_is_no_constructor(tmp_path: Path) -> None:
    """Also Uni2TS and FlexTok: a config inside an artefact names a function. Here it is data, or refused."""
    config = {"model_type": "llama", "_target_": "os.system", "_args_": [f"touch {tmp_path}/stolen"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.read_config(ModelConfig(path=str(tmp_path)), FAMILY) == config
    (tmp_path / "config.yaml").write_text("trainer:\n  name: sft\n  args: {_target_: os.system}\n")
    with pytest.raises(Refused, match="names code to run"):
        compose([f"run='{tmp_path}'"])
    assert not (tmp_path / "stolen").exists()
    assert not any("instantiate" in found for _, text in sources() for found in findings(text))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "logging.os.system",
        "builtins.open",
        "shutil.copyfile",
        "timeit.timeit",
        "my.own",
        "builtins.int",
        "",
    ],
)
def test_cve_2026_68508_ghsa_37p2_ghsa_2cp2_hydra_no_list_of_forbidden_names(target: str) -> None:
    """Aliases go round any list, so no name is looked at: the key alone is refused."""
    with pytest.raises(Refused, match="names code to run"):
        compose([*TINY, f"trainer.args={{x: {{_target_: '{target}'}}}}"])
    with pytest.raises(Refused, match="names code to run"):
        config_guard.check_values(OmegaConf.create({"a": [{"b": {"_target_": target}}]}))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "weights.pkl", "training_args.bin"]
)
def test_cve_2025_32434_ghsa_63cw_torch_weights_only_is_no_boundary(name: str, in_tmp: Path) -> None:
    """Weights that come as a pickle alone are refused; `weights_only` is not asked to be safe."""
    (in_tmp / "model").mkdir()
    (in_tmp / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    pickled(in_tmp / "model" / name, in_tmp / "stolen")
    with pytest.raises(Refused, match=r"can run code when it is read") as refused:
        pipeline.prepare(typed(compose(["+model=llama", "model.path=model", "+trainer=sft"])))
    assert refused.value.code == Exit.DATA
    assert not (in_tmp / "stolen").exists()


def test_cve_2025_53002_llama_factory_a_pickled_part_beside_an_adapter(in_tmp: Path) -> None:
    (in_tmp / "adapter").mkdir()
    (in_tmp / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    for name in ("adapter_model.bin", "value_head.bin"):
        pickled(in_tmp / "adapter" / name, in_tmp / "stolen")
    with pytest.raises(Refused, match=r"adapter\.path: adapter holds its weights as a pickle \(adapter_model\.bin\)"):
        pipeline.prepare(typed(compose([*TINY, "adapter.path=adapter"])))
    assert not (in_tmp / "stolen").exists()


def test_cve_2026_24159_cve_2026_31221_vu252619_cve_2025_23298_cve_2026_1839_resuming(in_tmp: Path) -> None:
    """NeMo, Lightning, Transformers4Rec, transformers: a checkpoint's optimizer, position or generators as a pickle."""
    folder = in_tmp / "run" / "checkpoints" / "checkpoint-1"
    names = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "scaler.pt",
        "training_args.bin",
        "model.ckpt",
    )
    for name in names:
        pickled(folder / name, in_tmp / "stolen")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    assert store.newest_valid(folder.parent) is None, "a folder without a manifest is no checkpoint"
    with pytest.raises(Refused):
        store.checked(folder)
    with manifest.sealed(folder.with_name("checkpoint-2"), {"step": 2}) as work:
        for name in names:
            pickled(work / name, in_tmp / "stolen")
    whole = store.newest_valid(folder.parent)
    assert whole is not None
    with pytest.raises(Refused, match="holds no optimizer"):  # sealed by somebody, and without what ftcore writes
        tree.read(whole, "optimizer")
    assert not (in_tmp / "stolen").exists()


@pytest.mark.parametrize("text", INJECTIONS[::7])
def test_cve_2024_34359_llama_cpp_python_cve_2026_5760_sglang_vllm_litgpt_templates_reach_nothing(text: str) -> None:
    """The same renderer for a tokenizer's template and for that of a GGUF file."""

    class GgufTemplate:
        chat_template = text
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012 - as the class that it stands for

        def get_chat_template(self, tools: Any = None) -> str:
            return text

    for tokenizer in (byte_tokenizer(text), GgufTemplate()):
        try:
            said = render(tokenizer, TALK)  # type: ignore[arg-type]
        except Refused:
            continue
        assert "<class" not in said and "<module" not in said


@pytest.mark.skipif(not llama_cpp_installed(), reason="llama.cpp is not installed")
@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<IQQ", 3, 2**63, 1),
        struct.pack("<IQQ", 3, 1, 2**63),
        struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"general.name",
        struct.pack("<IQQQ", 3, 0, 1, 12) + b"general.name" + struct.pack("<IIQ", 9, 4, 2**61),
    ],
)
def test_cve_2025_53630_cve_2026_27940_cve_2026_7482_gguf_sizes_that_lie(head: bytes, tmp_path: Path) -> None:
    """Native code reads them in a process of its own, whose end is a message."""
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + head)
    with pytest.raises(Refused, match=r"x\.gguf: llama\.cpp"):
        LlamaCpp(file, vocab_only=True)


def test_the_same_for_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for size in (2**63, 2**40, 100):
        file.write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(Refused, match="the header is longer than the file"):
            read_weights(file)


def test_cve_2025_50460_ms_swift_yaml_makes_no_objects(in_tmp: Path) -> None:
    (in_tmp / "run").mkdir()
    (in_tmp / "run" / "config.yaml").write_text(f"objective: !!python/object/apply:os.mkdir ['{in_tmp}/stolen']\n")
    with pytest.raises(Refused, match="could not determine a constructor"):
        compose(["run=run"])
    assert not (in_tmp / "stolen").exists()


def test_cve_2026_5843_mlx_lm_unsloth_6869_axolotl_3819_one_rule_for_every_loader() -> None:
    """Side doors were a config's key, the export and the preprocessing: every call of every file says no."""
    calls = 0
    for path, text in sources():
        if "testing" not in path:
            assert [found for found in findings(text) if "trust_remote_code" in found] == [], path
            calls += text.count("trust_remote_code=False")
    assert calls >= 15


def test_ms_swift_and_llamaboard_no_default_trusts() -> None:
    import dataclasses

    from ftcore.catalog import installed
    from ftcore.config import KINDS, RunConfig

    configs = [
        RunConfig(),
        *(option.config_class()(name=option.name) for kind in KINDS for option in installed().options(kind)),
    ]
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    assert len(names) > 100
    assert not [name for name in names if "trust" in name or "remote_code" in name or name.endswith("_token")]


@pytest.mark.parametrize(
    "name", ["../x", "..\\x", "a/../../x", "C:\\x", "\\\\server\\x", "/etc/passwd", "a\0b", "con.txt"]
)
def test_cve_2026_28414_gradio_cve_2026_39844_nicegui_unsloth_7897_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it "):
        safe_join(tmp_path, name)


@pytest.mark.parametrize(
    "link",
    [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "https://localhost:8000/x",
        "ftp://a/b",
        "/etc/passwd",
    ],
)
def test_cve_2026_28416_gradio_requests_of_a_row(link: str, tmp_path: Path) -> None:
    assert reaching({"image": link}, ["image"], Reach(), tmp_path)


def test_litellm_ultralytics_nothing_is_installed_while_running() -> None:
    """And nothing that Python starts by itself is brought along."""
    for path, text in sources():
        assert "ensurepip" not in text, path
        if "subprocess" in text and "testing" not in path:
            assert '"pip"' not in text and '"curl"' not in text and '"git"' not in text, path
    assert not list((ROOT / "ftcore").rglob("*.pth")) and not list((ROOT / "plugins").rglob("*.pth"))


def test_unsloth_11100_diffusers_6916_kohya_1123_nemo_rl_3837_trackio_535_a_dry_run_shows_no_token(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "canary0123456789"
    monkeypatch.setenv("HF_TOKEN", secret)
    assert command([*TINY, f"objective={secret}", "trainer.lerning_rate=1"]) == Exit.CONFIG
    for words in (
        ["plan", *TINY, f"trainer.args={{hub_token: {secret}}}"],
        ["plan", *TINY, "objective=${oc.env:HF_TOKEN}"],
    ):
        assert command(words) == Exit.CONFIG
    seen = capsys.readouterr()
    assert secret not in seen.out + seen.err


def test_a_plugin_that_nobody_selected_is_not_imported(in_tmp: Path) -> None:
    """Its metadata is read, as that of every installed package, and nothing more."""
    info = in_tmp / "evil_ft-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil-ft\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ftcore.model]\nevil = evil_ft\n[ftcore.extra]\nevil = evil_ft\n")
    (in_tmp / "evil_ft.py").write_text("open('stolen', 'w')\n")
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from ftcore.catalog import installed\nfrom ftcore.cli import run\nfrom ftcore.composition import compose\n"
        "assert 'evil' in installed().names('model')\n"
        "run(['plugins']); run(['plugins', 'extra']); compose(['+model=llama', '+trainer=sft'])\n"
        "assert 'evil_ft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=in_tmp, capture_output=True, timeout=60, check=True)
    assert not (in_tmp / "stolen").exists()


def test_security_md_names_tests_that_there_are() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests/)?[\w/]+(?:\.py)?)`", text))
    files = {name for name in named if name.startswith("tests/") or re.fullmatch(r"test_\w+\.py", name)}
    assert len(files) >= 12
    for name in files:
        assert (ROOT / name).exists() or (ROOT / "tests" / "reliability" / name).exists(), name
    own = Path(__file__).read_text(encoding="utf-8").lower()
    holes = re.findall(r"CVE-\d+-\d+|GHSA-\w{4}|VU#\d+", text)
    assert len(holes) >= 20
    assert not [hole for hole in holes if hole.lower().replace("-", "_").replace("#", "") not in own]
