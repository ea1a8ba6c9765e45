# SPDX-License-Identifier: Apache-2.0
"""Old import paths keep working for one release, with a warning that names the new one."""

import importlib
import subprocess
import sys

import pytest

from clp_ros.moved_modules import MOVED, RENAMED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_gives_what_the_new_one_does(old: str) -> None:
    sys.modules.pop(f"clp_ros.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"is now clp_ros.{MOVED[old]};"):
        module = importlib.import_module(f"clp_ros.{old}")
    new = importlib.import_module(f"clp_ros.{MOVED[old]}")
    public = {name for name in vars(new) if not name.startswith("_")}
    assert public
    assert all(getattr(module, name) is getattr(new, name) for name in public)


@pytest.mark.parametrize(("old", "name"), [(old, name) for old, names in RENAMED.items() for name in names])
def test_a_renamed_class_keeps_its_old_name_in_the_old_module(old: str, name: str) -> None:
    sys.modules.pop(f"clp_ros.{old}", None)
    with pytest.warns(DeprecationWarning, match="is now"):
        module = importlib.import_module(f"clp_ros.{old}")
    place, _, new_name = RENAMED[old][name].partition(":")
    assert getattr(module, name) is getattr(importlib.import_module(f"clp_ros.{place}"), new_name)


def test_the_old_entry_of_torchrun() -> None:
    command = [sys.executable, "-m", "clp_ros.pruning.calibration", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: clp calibrate" in done.stdout
    assert done.stderr.splitlines()[0].startswith("warning: -m clp_ros.pruning.calibration is now -m clp_ros.cli")
    with pytest.warns(DeprecationWarning, match=r"is now clp_ros\.calibration\.calibrate"):
        from clp_ros.pruning.calibration import calibrate_bags
    assert calibrate_bags is importlib.import_module("clp_ros.calibration.calibrate").calibrate_bags
