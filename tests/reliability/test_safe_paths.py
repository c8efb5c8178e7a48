"""Names from outside stay in their folder, by the rules of POSIX and of Windows, whatever system the test runs on."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftcore import checkpoint
from ftcore.catalog import installed
from ftcore.composition import compose, typed
from ftcore.errors import Refused
from ftcore.manager import Hooks
from ftcore.paths import claim_run_dir, safe_join, whole_folder
from ftcore.safetensors_file import checkpoint_files

PIECES = (
    *(
        "..",
        ".",
        "...",
        "",
        "a",
        "model.safetensors",
        "C:",
        "c:",
        "\\",
        "/",
        "//",
        "\\\\",
        "\\\\server\\share",
        "\\\\?\\C:\\",
    ),
    *(
        "..\\",
        "../",
        "~",
        "~root",
        "\0",
        "\n",
        "\x7f",
        "CON",
        "nul.txt",
        "com1",
        "LPT9.x",
        "aux ",
        "a.",
        "a ",
        "x:stream",
    ),
    *(
        "link",
        "inside",
        "%2e%2e",
        "file://",
        "etc",
        "passwd",
        "$HOME",
        "\u2025",
        "\uff0e\uff0e",
        "\u2215",
        "\ud800",
        "é",
    ),
)
names = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=6).flatmap(
    lambda pieces: st.sampled_from(["/", "\\", ""]).map(lambda between: between.join(pieces))
)
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a link out of it and one that stays."""
    folder = tmp_path_factory.mktemp("root") / "below"
    folder.mkdir()
    (folder / "inside").mkdir()
    (folder / "link").symlink_to(folder.parent)
    (folder / "etc").symlink_to("/etc")
    (folder / "stays").symlink_to(folder / "inside")
    return folder


def escapes(name: str, root: Path) -> bool:
    """Whether the name leaves its folder on some system, or names a device: told without ftcore's own rules."""
    windows = ntpath.normpath(ntpath.join("Z:\\root", name))
    posix = posixpath.normpath(posixpath.join("/folder", name))
    parts = name.replace("\\", "/").split("/")
    return (
        not windows.startswith("Z:\\root\\")
        or ":" in windows[2:]
        or not posix.startswith("/folder/")
        or "\0" in name
        or any(part.split(".")[0].strip().lower() in DEVICES for part in parts)
        or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root))
    )


def taken(name: str, root: Path) -> bool:
    """Whether the name is taken; none that leaves its folder is."""
    try:
        place = safe_join(root, name)
    except ValueError:
        return False
    assert not escapes(name, root), repr(name)
    assert place == root / name
    return True


def test_five_thousand_names(root: Path) -> None:
    chosen = random.Random(5)
    made = {
        chosen.choice("/\\").join(chosen.choices((*PIECES, "b", "stays"), k=chosen.randint(1, 5))) for _ in range(9_000)
    }
    assert len(made) > 5_000
    assert sum(taken(name, root) for name in made) > 50, "a rule that takes nothing proves nothing"


@pytest.mark.slow
def test_five_thousand_names_that_hypothesis_thinks_of(root: Path) -> None:
    @settings(max_examples=5_000, deadline=None, derandomize=True, database=None)
    @given(name=names)
    def holds(name: str) -> None:
        taken(name, root)

    holds()


@pytest.mark.parametrize(
    "name", ["a", "model-00001-of-00002.safetensors", "a/b.json", ".hidden", "stays/x", "Q4_K_M.gguf", "é"]
)
def test_ordinary_names_are_taken(name: str, root: Path) -> None:
    assert safe_join(root, name) == root / name


@pytest.mark.parametrize("name", [*PIECES[4:6], None, 7, b"a", ["a"]])
def test_only_texts_are_names(name: Any, root: Path) -> None:
    if isinstance(name, str):
        assert safe_join(root, name)
    else:
        with pytest.raises(ValueError, match="no name"):
            safe_join(root, name)


def test_links_lead_out_only_where_they_may(root: Path) -> None:
    with pytest.raises(ValueError, match="a link leads out"):
        safe_join(root, "link/x")
    assert safe_join(root, "etc", follow=True)
    with pytest.raises(ValueError, match="not a path below"):
        safe_join(root, "../x", follow=True)


BAD = (
    "../x",
    "..\\x",
    "/etc/passwd",
    "C:\\x",
    "C:x",
    "\\\\server\\x",
    "a/b",
    "",
    ".",
    "..",
    "con",
    "a\0b",
    "a.",
    None,
    7,
    {},
)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_no_index_of_weights_leads_out(index: str, name: object, tmp_path: Path) -> None:
    """Before any weights load: transformers itself would follow such a name."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": name}}))
    run = typed(compose(["+model=llama", f"model.path='{tmp_path}'"]))
    assert run.model is not None
    from ftcore import hooks as h

    family = Hooks.for_run(run, installed()).first(h.ftcore_model_family, config=run.model)
    (problem,) = checkpoint.problems(run.model, family)
    assert "which is not the name of a file in that folder" in problem.message or "damaged" in problem.message
    if index.startswith("model"):
        with pytest.raises(Refused):
            checkpoint_files(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
@pytest.mark.parametrize(("umask", "rights"), [(0o077, 0o700), (0o022, 0o755), (0o002, 0o775)])
def test_folders_have_the_rights_that_the_user_gives(umask: int, rights: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run = claim_run_dir(tmp_path / "run-001")
        with whole_folder(run / "export") as folder:
            (folder / "x").touch()
    finally:
        os.umask(before)
    assert [place.stat().st_mode & 0o7777 for place in (run, run / "export")] == [rights] * 2
    assert (run / "export" / "x").stat().st_mode & 0o7777 == rights & 0o666


@pytest.mark.parametrize(
    "name", ["../../etc", "..", "a/..", "./a", "a/b/c", "/etc", "C:\\x", "a\\b", "-x/y", "a/b@main", ".a/b"]
)
def test_no_hub_id_is_a_path(name: str) -> None:
    run = typed(compose(["+model=llama", f"model.id='{name}'"]))
    assert run.model is not None
    from ftcore import hooks as h

    family = Hooks.for_run(run, installed()).first(h.ftcore_model_family, config=run.model)
    (problem,) = checkpoint.problems(run.model, family)
    assert problem.message == f"'{name}' is no hub id"
