"""What readers of moe/ are given: its map, moe/README.md, holds to the tree, and docs/knobs.md to the declarations."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from moe.space.__main__ import pages

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "moe" / "README.md").read_text(encoding="utf-8")


def test_every_module_has_one_line() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)`°? \|", MAP, flags=re.MULTILINE)
    there = [path.relative_to(ROOT / "moe").as_posix() for path in (ROOT / "moe").rglob("*.py")]
    assert sorted(named) == sorted(name for name in there if not name.endswith("__init__.py"))


def test_modules_marked_as_free_of_torch_are_those_that_the_linter_holds_to_it() -> None:
    marked = re.findall(r"^\| `([\w/]+)\.py`° \|", MAP, flags=re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    free = next(each["source_modules"] for each in contracts if "torch never" in each["name"])
    packages = [name for name in free if (ROOT / name.replace(".", "/")).is_dir()]
    modules = {"moe." + name.replace("/", ".") for name in marked}
    assert {name for name in modules if name.rpartition(".")[0] not in packages} == {
        name for name in free if name.startswith("moe.") and name not in packages
    }


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"(tests/moe/test_\w+\.py)::(\w+)", MAP)
    assert len(named) > 30
    for path, name in named:
        body = ast.parse((ROOT / path).read_text()).body
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in body), f"{path}::{name}"


def test_the_table_of_knobs_is_what_the_fields_declare() -> None:
    table = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
    assert table == "\n".join(pages()), "changed on purpose? python -m moe.space > docs/knobs.md"
