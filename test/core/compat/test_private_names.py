# SPDX-License-Identifier: Apache-2.0
"""Private names of other libraries stand in the compat files only."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMPAT = ("clp_ros/core/compat/", "clp_ros/nodes/compat.py", "lerobot_policy_clp/lerobot_policy_clp/compat.py")
# Documented under these names.
DOCUMENTED = {"_exit", "_getframe"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, fields, and attributes that it sets on self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname}
    return names


def inherited_names(tree: ast.Module) -> set[str]:
    """Private names of this package's classes from which a class of the file is derived."""
    bases = {base.id for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases if is_name(base)}
    names = set()
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("clp_ros."):
            continue
        if bases & {alias.asname or alias.name for alias in node.names}:
            path = ROOT / (node.module or "").replace(".", "/")
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            names |= own_names(ast.parse(file.read_text()))
    return names


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def foreign_private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and names: imported from another distribution, or attributes that neither the file nor a base defines."""
    own, inherited = own_names(tree), inherited_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if node.attr in inherited and is_name(node.value) and node.value.id == "self":
                continue
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and is_private(node.arg or ""):
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] != "clp_ros":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))


def test_private_names_stand_in_compat_files_only():
    files = [path for folder in ("clp_ros", "lerobot_policy_clp", "launch") for path in (ROOT / folder).rglob("*.py")]
    found = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        if not path.relative_to(ROOT).as_posix().startswith(COMPAT)
        for line, name in foreign_private_names(ast.parse(path.read_text()))
    }
    assert not found


def test_they_are_found():
    code = "from torch._C import x\nimport a\na._b\nf(_c=1)\nself._d = 1\nself._d\nself._e\nos._exit(1)\n"
    assert {name for _, name in foreign_private_names(ast.parse(code))} == {"_C", "_b", "_c", "_e"}


def test_what_a_class_inherits_from_this_package_is_not_foreign():
    code = (
        "from clp_ros.simulation.robot import SimulatedRobot\nimport a\n"
        "class One(SimulatedRobot):\n    def f(self):\n        return self._model, self._other, a._model\n"
    )
    assert sorted(name for _, name in foreign_private_names(ast.parse(code))) == ["_model", "_other"]
