"""A package of somebody else: built, installed, selected, overridden, brought into conflict."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ftcore.testing import Environment

ACME = Path(__file__).parent / "acme_ft"
TINY = (
    "model.tiny=true",
    "trainer.max_steps=2",
    "trainer.global_batch=4",
    "trainer.max_length=160",
    "sampling.max_new_tokens=4",
)

RIVAL = '''"""A rival's OLMo 2."""

from dataclasses import dataclass

from ftcore import ModelConfig, ModelFamily, hookimpl


@dataclass
class Config(ModelConfig):
    """The rival's settings."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    return ModelFamily(model_types=("olmo2",), roles=(), lora_targets=("q_proj",), tiny={"vocab_size": 259})
'''
BROKEN = '"""A plugin with a mistake."""\n\nraise RuntimeError("no such back end")\n'


def write_package(folder: Path, module: str, source: str, *points: str) -> Path:
    """A minimal package with entry points written as `kind/name`."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(source)
    groups = "\n".join(
        f'[project.entry-points."ftcore.{kind}"]\n{name} = "{module}"' for kind, name in (p.split("/") for p in points)
    )
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{module.replace("_", "-")}"\nversion = "0.3"\n{groups}\n'
    )
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ACME, out / "acme_ft", ignore=shutil.ignore_patterns("__pycache__", "dist"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def acme(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """acme-ft alone, installed from its wheel."""
    environment = Environment(tmp_path_factory.mktemp("acme") / "venv")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def crowded(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """acme-ft beside a rival that offers one name of acme's and one of ftcore's, and a package that does not import."""
    folder = tmp_path_factory.mktemp("crowded")
    rival = write_package(folder / "rival", "rival_ft", RIVAL, "model/acme_olmo2", "trainer/sft")
    broken = write_package(folder / "broken", "broken_ft", BROKEN, "export/broken")
    environment = Environment(folder / "venv")
    environment.install(wheel, rival, broken)
    return environment


def test_wheel_brings_code_and_yaml(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "acme_ft/olmo2.py",
        "acme_ft/zipped.py",
        "acme_ft/json_reward.py",
        "acme_ft/anchored.py",
        "acme_ft/conf/recipe/acme_sft.yaml",
    } <= set(names)


def test_plugins_are_listed_and_described(acme: Environment) -> None:
    listed = acme.ftcore("plugins").stdout
    assert [line.split()[:4] for line in listed.splitlines() if "acme" in line] == [
        ["model", "acme_olmo2", "acme-ft", "1.2.0"],
        ["trainer", "acme_anchored", "acme-ft", "1.2.0"],
        ["reward", "acme_json", "acme-ft", "1.2.0"],
        ["export", "acme_zip", "acme-ft", "1.2.0"],
    ]
    described = acme.ftcore("plugins", "export/acme_zip").stdout
    assert "acme-ft 1.2.0 (acme_ft.zipped)" in described
    assert "export.acme_zip.compression" in described
    assert "0 stores the files as they are" in described


@pytest.mark.slow
def test_its_own_tests_pass(acme: Environment, tmp_path: Path) -> None:
    tests = shutil.copytree(ACME / "tests", tmp_path / "tests")
    done = acme.python("-m", "pytest", "-q", str(tests), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_selected_and_one_hook_overridden(acme: Environment, tmp_path: Path) -> None:
    """Model and exporter are acme's; the file of the user wraps one stage and answers another in their place."""
    (tmp_path / "mine.py").write_text(
        "import ftcore\n\n\n"
        "@ftcore.hookimpl\n"
        "def ftcore_evaluate(trainer):\n"
        "    return {'eval_loss': 0.125}\n\n\n"
        "@ftcore.hookimpl(wrapper=True)\n"
        "def ftcore_export(plan, checkpoint):\n"
        "    artifacts = yield\n"
        "    (plan.output_dir / 'seen.txt').write_text(' '.join(a.target for a in artifacts))\n"
        "    return artifacts\n"
    )
    words = ("+model=acme_olmo2", "+trainer=sft", "+export=[acme_zip]", "plugins=[mine.py]", "output_dir=run", *TINY)
    done = acme.ftcore(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["metrics"]["eval_loss"] == 0.125
    assert (tmp_path / "run" / "seen.txt").read_text() == "acme_zip"
    origins = {plugin["name"]: plugin["origin"] for plugin in record["plugins"]}
    assert origins["model/acme_olmo2"] == "acme-ft 1.2.0 (acme_ft.olmo2)"
    assert origins["plugins/mine.py"] == "mine.py"
    assert {claim["role"] for claim in record["patches"]["claims"]} == {"mlp", "rms_norm"}
    with zipfile.ZipFile(tmp_path / "run" / "export" / "acme.zip") as archive:
        assert archive.testzip() is None
        assert {"config.json", "model.safetensors", "MANIFEST.json"} <= set(archive.namelist())


@pytest.mark.slow
def test_recipe_by_name(acme: Environment, tmp_path: Path) -> None:
    """The recipe's selections and values are there, and the command line wins over them."""
    done = acme.ftcore("+recipe=acme_sft", "adapter.r=4", "output_dir=run", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    assert "schedule: cosine" in recorded
    assert "r: 4" in recorded
    assert "compression: 1" in recorded
    assert (tmp_path / "run" / "export" / "acme.zip").is_file()


@pytest.mark.slow
def test_reward_judges_a_grpo_run(acme: Environment, tmp_path: Path) -> None:
    words = (
        "+model=acme_olmo2",
        "+trainer=grpo",
        "+reward=[acme_json]",
        "reward.acme_json.keys=[answer]",
        "output_dir=run",
        *TINY,
    )
    done = acme.ftcore(*words, "trainer.max_steps=1", "trainer.max_completion_length=8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "rewards/acme_json/mean" in logged


def test_trainer_by_its_entry_point_alone(acme: Environment, tmp_path: Path) -> None:
    """Selected, with a key of its own, on one of ftcore's families; its own check is a part of the plan."""
    words = ("+model=qwen3", "+trainer=acme_anchored", "trainer.pull=0.5", "output_dir=run", *TINY)
    done = acme.ftcore(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    origins = {plugin["name"]: plugin["origin"] for plugin in record["plugins"]}
    assert origins["trainer/acme_anchored"] == "acme-ft 1.2.0 (acme_ft.anchored)"
    assert "pull: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    refused = acme.ftcore("plan", *words[:2], "trainer.pull=-1", "model.tiny=true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "trainer.pull: is -1.0" in refused.stderr


def test_problems_of_a_third_party_are_shown_with_the_rest(acme: Environment, tmp_path: Path) -> None:
    words = (
        "plan",
        "+model=acme_olmo2",
        "model.tiny=true",
        "+export=[acme_zip]",
        "export.acme_zip.compression=12",
        "adapter.r=0",
    )
    done = acme.ftcore(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "export.acme_zip.compression: is 12" in done.stderr
    assert "adapter.r: is 0" in done.stderr


def test_conflict_names_both_packages_and_the_way_out(crowded: Environment, tmp_path: Path) -> None:
    done = crowded.ftcore("plan", "+model=acme_olmo2", "model.tiny=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "model=acme_olmo2: is offered by 2 packages" in done.stderr
    assert "acme-ft 1.2.0 (acme_ft.olmo2)" in done.stderr
    assert "rival-ft 0.3 (rival_ft)" in done.stderr
    assert "fix: say +model=rival-ft:acme_olmo2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_conflict_resolved_by_naming_the_package(crowded: Environment, tmp_path: Path) -> None:
    """One trains with the other beside it, and the choice is on record."""
    words = ("+model=acme-ft:acme_olmo2", "+trainer=ftcore:sft", *TINY)
    done = crowded.ftcore(*words, "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    origins = {p["name"]: p["origin"] for p in json.loads((tmp_path / "run" / "run.json").read_text())["plugins"]}
    assert origins["model/acme_olmo2"] == "acme-ft 1.2.0 (acme_ft.olmo2)"
    # The record alone is enough to find the same package again.
    again = crowded.ftcore("plan", "run=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_shipped_name_is_not_shadowed(crowded: Environment, tmp_path: Path) -> None:
    done = crowded.ftcore("plan", "+model=qwen3", "model.tiny=true", "+trainer=sft", cwd=tmp_path)
    assert done.returncode == 2
    assert "trainer=sft: is offered by 2 packages" in done.stderr
    assert "ftcore " in done.stderr
    assert "rival-ft 0.3" in done.stderr


def test_a_broken_package_breaks_only_the_run_that_selects_it(crowded: Environment, tmp_path: Path) -> None:
    """It is listed, and named when it is asked for; runs that select others go through beside it."""
    listed = crowded.ftcore("plugins")
    assert listed.returncode == 0
    assert "broken-ft 0.3" in listed.stdout
    done = crowded.ftcore("plan", "+model=qwen3", "model.tiny=true", "+export=[broken]", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "export=broken of broken-ft 0.3 (broken_ft) cannot be imported: RuntimeError: no such back end" in done.stderr
    )
    assert "fix: reinstall or remove the package broken-ft" in done.stderr
    found = crowded.ftcore("plugins", "--broken")
    assert "broken-ft" in found.stdout + found.stderr


def without(name: str, folder: Path) -> Path:
    """This environment's packages again, but with one entry point of ftcore's taken out."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("ftcore-"):
            (packages / entry.name).symlink_to(entry)
            continue
        copied = shutil.copytree(entry, packages / entry.name)
        points = copied / "entry_points.txt"
        kept = [line for line in points.read_text().splitlines() if not line.startswith(f"{name} =")]
        assert len(kept) == len(points.read_text().splitlines()) - 1
        points.write_text("\n".join(kept) + "\n")
    return packages


def test_removing_an_entry_point_removes_that_option_and_nothing_else(tmp_path: Path) -> None:
    packages = without("qwen3", tmp_path)
    script = f"import site, sys; site.addsitedir({str(packages)!r}); from ftcore.cli import main; main()"

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        # -S: none of the environment's own packages, only the copy's.
        return subprocess.run(
            [sys.executable, "-S", "-c", script, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )

    whole = subprocess.run(
        [sys.executable, "-m", "ftcore", "plugins"], capture_output=True, text=True, check=True
    ).stdout
    options = [line.split()[:2] for line in whole.splitlines()]
    assert ["model", "qwen3"] in options
    left = [line.split()[:2] for line in call("plugins").stdout.splitlines()]
    assert left == [option for option in options if option != ["model", "qwen3"]]
    done = call("plan", "+model=qwen3")
    assert done.returncode == 2
    assert "there is no model named 'qwen3'" in done.stderr
    assert call("plugins", "model/llama").returncode == 0
