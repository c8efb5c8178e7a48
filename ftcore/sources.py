"""Names read from the sources of libraries that are too heavy to import for a check."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def argument_names(text: str) -> set[str]:
    """Field names of `package.module:Class` and its bases, read from the sources without importing them."""
    node, tree = _class_source(text)
    if node is None:
        return set()
    homes = {
        a.asname or a.name: (n.module or "", a.name, n.level)
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    names = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for base in node.bases:
        names |= _base_names(ast.unparse(base), text.partition(":")[0], homes)
    return names


def _class_source(text: str) -> tuple[ast.ClassDef | None, ast.Module]:
    """The class `package.module:Class` and its module as they are written; nothing is imported."""
    module, _, name = text.partition(":")
    spec = importlib.util.find_spec(module.partition(".")[0])
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]) if spec and spec.origin else Path(module)
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")
    found = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return next(found, None), tree


def _base_names(base: str, module: str, homes: dict[str, tuple[str, str, int]]) -> set[str]:
    home, name, level = homes.get(base, (module, base, 0))
    if level:
        home = ".".join([*module.split(".")[:-level], *filter(None, [home])])
    if home == "transformers" and name == "TrainingArguments":
        home = "transformers.training_args"
    return argument_names(f"{home}:{name}")


def enum_values(text: str) -> list[str]:
    """Values of the enum `package.module:Class`, read from its source without importing it."""
    node = _class_source(text)[0]
    body = node.body if node else []
    return [str(n.value.value) for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
