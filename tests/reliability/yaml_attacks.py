"""Configs that name code or read secrets, each brought in several ways; run as a script, which watches what happens.

Prints one line of JSON per payload and way: how the command ended, what it said, what it touched.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SECRET = "canary-of-the-environment-7"
HEAD = "# @package _global_\n"
TARGETS: dict[str, dict[str, Any]] = {
    "copyfile": {"_target_": "shutil.copyfile", "src": "canary", "dst": "stolen"},
    "open": {"_target_": "builtins.open", "file": "stolen", "mode": "w"},
    "alias": {"_target_": "logging.os.system", "_args_": ["touch stolen"]},
    "partial": {"_target_": "subprocess.Popen", "_partial_": True, "_args_": [["touch", "stolen"]]},
}
PLACES = (
    "hydra.callbacks.x",
    "hydra.launcher",
    "hydra.sweeper",
    "hydra.job_logging.handlers.x",
    "hydra.hydra_logging.handlers.x",
    "hydra.help.x",
    "trainer.args.x",
    "model.rope_scaling",
    "extra.x",
    "patching.prefer.x",
)
FACTORY = {"()": "shutil.copyfile", "src": "canary", "dst": "stolen"}
LOOKS = (
    "${oc.env:CANARY_TOKEN}",
    "${oc.env:'CANARY_TOKEN'}",
    "${oc.env:CANARY_TOKEN,none}",
    "a${oc.env:PATH}",
    "${oc.decode:${oc.env:CANARY_TOKEN}}",
    "${oc.${objective}:CANARY_TOKEN}",
    "${${objective}:CANARY_TOKEN}",
    "${oc.create:{a:${oc.env:CANARY_TOKEN}}}",
)
FILES = {
    "package": f"# @package hydra.callbacks\nx: {TARGETS['copyfile']}\n",
    "package with dots": f"# @package _global_.hydra.callbacks.x\n{yaml.safe_dump(TARGETS['copyfile'])}",
    "two packages": HEAD + f"# @package hydra.callbacks.x\n{yaml.safe_dump(TARGETS['copyfile'])}",
    "defaults": HEAD + "defaults:\n  - override /hydra/job_logging: evil\n",
    "defaults at": HEAD + "defaults:\n  - /recipe/other@hydra.callbacks\n",
    "defaults above": HEAD + "defaults:\n  - ../../../../etc/passwd@hydra.callbacks.x\n",
    "defaults by the environment": HEAD + "defaults:\n  - /recipe: ${oc.env:CANARY_TOKEN}\n",
    "python tag": HEAD + "objective: !!python/object/apply:os.system ['touch stolen']\n",
    "python name": HEAD + "objective: !!python/name:os.system\n",
    "python module": HEAD + "objective: !!python/module:antigravity\n",
    "merge key": HEAD + "x: &x {_target_: shutil.copyfile, src: canary, dst: stolen}\ntrainer:\n  args:\n    <<: *x\n",
    "dotted": HEAD + f"hydra.callbacks.x: {TARGETS['copyfile']}\n",
}
SETTINGS: dict[str, tuple[str, Any]] = {
    **{f"{place} {name}": (place, value) for place in PLACES for name, value in TARGETS.items()},
    "factory of a handler": ("hydra.job_logging", {"handlers": {"x": FACTORY}, "root": {"handlers": ["x"]}}),
    "class of a handler": (
        "hydra.hydra_logging",
        {"handlers": {"x": {"class": "logging.FileHandler", "filename": "stolen"}}},
    ),
    "parameters of a sweep": ("hydra.sweeper.params", {"+hydra.callbacks.x._target_": "shutil.copyfile"}),
    "search path": ("hydra.searchpath", ["file:///tmp"]),
    "environment of jobs": ("hydra.job.env_set", {"PATH": "/tmp"}),
    "in a list": ("prompts", [{"x": TARGETS["copyfile"]}]),
    **{f"look {number}": ("objective", text) for number, text in enumerate(LOOKS)},
}
PAYLOADS = (*SETTINGS, *FILES)
WAYS = ("CLI", "YAML", "config-dir", "plugin")
WORDS = ["+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=1"]
WATCHED = (
    "os.system",
    "os.exec",
    "os.remove",
    "os.rename",
    "os.posix_spawn",
    "subprocess.",
    "socket.connect",
    "shutil.",
)


def text_of(name: str) -> str:
    """The YAML of a payload."""
    if name in FILES:
        return FILES[name]
    place, value = SETTINGS[name]
    for part in reversed(place.split(".")):
        value = {part: value}
    return HEAD + yaml.safe_dump(value)


def words_of(name: str) -> list[str]:
    """The payload as words of the command line; a file has none."""
    if name in FILES:
        return []
    place, value = SETTINGS[name]
    return [f"++{place}={_in_hydras_grammar(value)}"]


def _in_hydras_grammar(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_in_hydras_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydras_grammar, value)) + "]"
    return "'" + str(value).replace("'", "\\'") + "'" if isinstance(value, str) else str(value).lower()


def commands(name: str, way: str) -> Iterator[list[str]]:
    """A plan and a sweep with the payload."""
    if name == "control":
        yield [name]
        return
    if way == "CLI":
        words = words_of(name)
    elif way == "config-dir":
        # The recipe that is selected is harmless; the payload lies beside it, where a sweep's words could reach it.
        words = ["+recipe=other", "+sweep=evil", "--config-dir", "conf"]
    else:
        words = ["+recipe=evil", *(["--config-dir", "conf"] if way == "YAML" else [])]
    if words:
        yield ["plan", *WORDS, *words]
        yield ["-m", *WORDS, *words]


def copied() -> int:
    """What the payloads are after, done."""
    import hydra.utils

    hydra.utils.instantiate({"_target_": "shutil.copyfile", "src": "canary", "dst": "stolen"})
    return 0


def place(name: str, way: str) -> None:
    """Write the payload where the way brings it in from."""
    from ftcore.catalog import installed

    for file in Path().rglob("*.yaml"):
        file.unlink()
    conf = installed().conf
    conf.pop("evil", None)
    root = Path("evil_conf" if way == "plugin" else "conf")
    for group in ("recipe", "sweep"):
        (root / group).mkdir(parents=True, exist_ok=True)
    if way == "plugin":
        (root / "__init__.py").touch()
        conf["evil"] = "evil_conf"
    if way != "CLI":
        (root / "recipe" / "other.yaml").write_text(HEAD + "objective: loss_last\n")
        (root / ("sweep" if way == "config-dir" else "recipe") / "evil.yaml").write_text(text_of(name))


def main(payloads: list[str]) -> None:
    """Try the payloads `NAME@WAY`; without any, all of them."""
    import hydra.main  # what is imported now does not count

    from ftcore.cli import run

    assert hydra.main
    sys.path.insert(0, os.getcwd())
    os.environ["CANARY_TOKEN"] = SECRET
    Path("canary").write_text("the canary")
    touched: list[str] = []
    watching = False

    def hook(event: str, args: Any) -> None:
        if watching and (event.startswith(WATCHED) or (event == "open" and "stolen" in str(args[0]))):
            touched.append(f"{event} {args}"[:200])

    sys.addaudithook(hook)
    for name, _, way in (one.rpartition("@") for one in payloads or [f"{n}@{w}" for n in PAYLOADS for w in WAYS]):
        place(name, way)
        for words in commands(name, way):
            touched.clear()
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                watching = True
                try:
                    code = run(words) if name != "control" else copied()
                except Exception as error:
                    code = -1
                    said.write(f"{type(error).__name__}: {error}")
                watching = False
            made = [path for path in ("stolen", "runs", "multirun") if Path(path).exists()]
            made += [] if Path("canary").read_text() == "the canary" else ["canary"]
            line = {"name": name, "way": way, "words": words, "code": code, "said": said.getvalue()[:4000]}
            print(json.dumps({**line, "touched": list(touched), "made": made}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
