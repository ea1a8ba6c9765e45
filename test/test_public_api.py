# SPDX-License-Identifier: Apache-2.0
"""What ``import clp_ros`` and its rooms export, with their types, and the examples in docstrings."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import clp_ros

PACKAGE = Path(clp_ros.__file__).parent
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if "    >>> " in path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("stub", STUBS, ids=module_name)
def test_every_exported_name_is_there(stub: Path) -> None:
    room = importlib.import_module(module_name(stub))
    nodes = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.name: f"{room.__name__}.{node.module or ''}" for node in nodes for alias in node.names}
    assert set(room.__all__) == set(names)
    for name, module in names.items():
        found = getattr(room, name)
        assert found is getattr(importlib.import_module(module.removesuffix(".")), name)
        assert found.__doc__ or not callable(found)


def test_importing_the_package_imports_no_large_library() -> None:
    large = {"torch", "lerobot", "transformers", "matplotlib", "rosbags", "rclpy", "pydantic"}
    code = "import clp_ros, clp_ros.calibration, clp_ros.policies, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert large.isdisjoint(loaded)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_name)
def test_examples(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(module_name(path)), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
