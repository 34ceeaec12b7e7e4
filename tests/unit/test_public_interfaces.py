"""The package uses the public interfaces of other packages: no name that begins with an underscore, no patching."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "umbrella").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
"""Public, in spite of their names."""
BY_NAME = {"getattr", "hasattr", "setattr"}
PRIVATE_MODULE = re.compile(r"\._(private|internal|inductor|dynamo)\b")


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names that the package defines itself: functions, classes, and what is assigned, also as an attribute."""
    names = set(NAMED_TUPLE)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def private_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name of another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in [*module, *(alias.name for alias in node.names)]:
                if any(map(is_private, name.split("."))) or name.startswith("unittest"):
                    yield node.lineno, name
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg) and node.arg not in own:
            yield node.lineno, node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(str(name)):
                yield node.lineno, str(name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE_MODULE.search(node.value):
            yield node.lineno, node.value


def test_no_private_name_of_another_package_is_used() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    own = own_names(trees)
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file, tree in zip(FILES, trees, strict=True)
        for line, name in private_names(tree, own)
    ]
    assert found == []


def test_private_names_are_found_however_they_are_written() -> None:
    code = """
from ray._private import services
import torch._inductor
from unittest import mock
ray.worker._global_node
ray.init(_node_ip_address="::1")
getattr(model, "_hf_peft_config_loaded", False)
logging.getLogger("ray.data._internal.progress")
self._own = self._own + 1
"""
    tree = ast.parse(code)
    lines = [line for line, _ in private_names(tree, own_names([tree]))]
    assert sorted(set(lines)) == [2, 3, 4, 5, 6, 7, 8]


def test_no_file_has_more_than_400_lines() -> None:
    assert [file.name for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > 400] == []
