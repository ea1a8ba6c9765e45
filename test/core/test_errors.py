# SPDX-License-Identifier: Apache-2.0
"""The form of errors, and their old names."""

import importlib
import pickle

import pytest

from clp_ros.core.errors import ClpError, NotHereError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ClpError("is empty"), "is empty"),
        (ClpError("is empty", where="/eye"), "/eye: is empty"),
        (ClpError("is empty", hint="fill it"), "is empty (hint: fill it)"),
        (ClpError("is\nempty", where="/eye", hint="fill  it"), "/eye: is empty (hint: fill it)"),
        (ClpError("is empty", where="/eye", hint="fill it").at("bag"), "bag: is empty (hint: fill it)"),
        (NotHereError("is empty").at("bag", "the bag "), "bag: the bag is empty"),
    ],
)
def test_the_form_of_an_error(error: ClpError, text: str) -> None:
    assert str(error) == text
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - between the processes of a benchmark
    assert (type(copied), str(copied), copied.where, copied.hint) == (type(error), text, error.where, error.hint)


def test_the_old_name_of_the_hint() -> None:
    with pytest.warns(DeprecationWarning, match="hint"):
        assert ClpError("is empty", hint="fill it").fix == "fill it"


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("robots.observation", "NotReady", "NotReadyError"),
        ("robots.joint_states", "OtherJoints", "OtherJointsError"),
        ("control.inputs", "Incomplete", "IncompleteError"),
        ("control.safety", "Outside", "OutsideError"),
        ("control.chunk_schedule", "Late", "LateError"),
        ("policies.lerobot_policy", "LoadedPolicy", "LeRobotPolicy"),
    ],
)
def test_old_names_of_classes(module: str, old: str, new: str) -> None:
    found = importlib.import_module(f"clp_ros.{module}")
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="no attribute 'NoSuch'"):
        _ = found.NoSuch
