"""No plugin of ftcore's own is without a contract, and the contract is that of its kind."""

import ast
from pathlib import Path

from ftcore.catalog import installed
from ftcore.config import KINDS
from ftcore.testing import CONTRACTS, PluginContract


def contracts() -> dict[str, set[str]]:
    """`kind/name` to the base classes of the test classes that name it; read from the files without importing them."""
    found: dict[str, set[str]] = {}
    for file in Path(__file__).parent.glob("test_contract_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "plugin":
                    found.setdefault(ast.literal_eval(line.value), set()).update(map(ast.unparse, node.bases))
    return found


def test_every_plugin_has_the_contract_of_its_kind() -> None:
    have = contracts()
    own = [option for kind in KINDS for option in installed().options(kind) if option.dist == "ftcore"]
    assert len(own) > 20
    missing = [
        f"{o.kind}/{o.name}" for o in own if CONTRACTS[o.kind].__name__ not in have.get(f"{o.kind}/{o.name}", set())
    ]
    assert not missing, f"add a class to tests/contract/ for {', '.join(missing)}"


def test_every_contract_is_of_an_installed_plugin() -> None:
    unknown = [
        name for name in contracts() if name not in {f"{k}/{o.name}" for k in KINDS for o in installed().options(k)}
    ]
    assert not unknown, f"these are tested but not installed; run `pip install -e .`: {', '.join(unknown)}"


def test_there_is_a_contract_for_every_kind() -> None:
    assert list(CONTRACTS) == list(KINDS)
    assert all(issubclass(contract, PluginContract) for contract in CONTRACTS.values())
