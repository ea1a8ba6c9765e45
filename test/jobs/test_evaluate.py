# SPDX-License-Identifier: Apache-2.0
"""Evaluations in closed loop, on the command line and as a job: outcomes, resuming, refusals."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clp_ros import cli
from clp_ros.core.errors import ClpError
from clp_ros.jobs.evaluate import EvaluateRequest, run

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation needs requirements-simulation.txt", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = {"embodiment": "ur5", "tasks": ("pick_and_lift",), "episodes": 2, "batch": 1, "workers": 0}
QUICK = {"latency": 20.0, "size": (32, 24)}


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint: Callable[..., Path]) -> Path:
    """A random policy: its chunks begin far from the arm, so an episode ends soon."""
    return family_checkpoint("smolvla", "ur5")


@pytest.fixture(scope="module")
def other(family_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from clp_ros.jobs.make_checkpoint import MakeCheckpointRequest
    from clp_ros.jobs.make_checkpoint import run as make

    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    make(MakeCheckpointRequest(family="smolvla", size="tiny", embodiment="ur5", output=folder, seed=1))
    return folder


def test_command_writes_the_promised_json(
    checkpoint: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(checkpoint), str(other), "--embodiment", "ur5", "--task", "pick_and_lift"]
    options = ["--episodes", "2", "--seed", "7", "--workers", "0", "--size", "32x24", "--output", str(tmp_path / "e")]
    assert cli.main([*arguments, *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["embodiment"], document["task"]) == ("ur5", "pick_and_lift")
    first, second = document["checkpoints"]
    assert first["path"] == str(checkpoint)
    assert [one["seed"] for one in first["outcomes"]] == [7, 8]
    assert [one["start"] for one in first["outcomes"]] == [one["start"] for one in second["outcomes"]]
    assert (first["episodes"], first["successes"], first["success_rate"]) == (2, 0, 0.0)
    assert first["interval"][0] == 0 < first["interval"][1] < 1
    assert first["latency_ms"] > 0
    (pair,) = document["paired"]
    assert (pair["a"], pair["b"], pair["p_value"]) == (str(checkpoint), str(other), 1.0)
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text()) == document
    import cv2

    sheet = cv2.imread(str(tmp_path / "e" / "contact_sheet.png"))
    assert sheet.shape[1] > 600


def test_goes_on_where_it_was_and_adds_episodes(checkpoint: Path, tmp_path: Path) -> None:
    asked = ASKED | QUICK | {"checkpoints": (checkpoint,), "output": tmp_path / "e"}
    whole = run(EvaluateRequest(**asked))
    (policy,) = (tmp_path / "e" / "policies").iterdir()
    kept = policy / "pick_and_lift_0.json"
    stamp = kept.stat().st_mtime_ns
    (policy / "pick_and_lift_1.json").unlink()
    again = run(EvaluateRequest(**asked))
    assert again.checkpoints[0].outcomes == whole.checkpoints[0].outcomes
    assert kept.stat().st_mtime_ns == stamp
    more = run(EvaluateRequest(**asked | {"episodes": 1, "tasks": ("pick_and_lift", "push_to_zone")}))
    lift, push = more.checkpoints[0].outcomes
    assert lift == whole.checkpoints[0].outcomes[0]
    assert (push.task, push.seed) == ("push_to_zone", 0)
    assert push.instruction != lift.instruction
    with pytest.raises(ClpError, match="another evaluation, whose seed differs"):
        run(EvaluateRequest(**asked | {"seed": 1}))


def test_other_starts_are_not_compared(checkpoint: Path, other: Path, tmp_path: Path) -> None:
    asked = ASKED | QUICK | {"episodes": 1}
    run(EvaluateRequest(**asked, checkpoints=(checkpoint,), output=tmp_path / "e"))
    same = run(EvaluateRequest(**asked, checkpoints=(other, tmp_path / "e")))
    assert [row.path for row in same.checkpoints] == [str(other), str(checkpoint)]
    assert len(same.paired) == 1
    with pytest.raises(ClpError, match="other starts"):
        run(EvaluateRequest(**asked | {"seed": 5}, checkpoints=(other, tmp_path / "e")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("pick_and_lft",)}, "did you mean"),
        ({"tasks": ("hand_over",)}, "cannot do"),
        ({"latency": 5000.0}, "max_latency"),
        ({"mode": "rtc", "batch": 2}, "rtc"),
    ],
)
def test_refusals(checkpoint: Path, change: dict, message: str) -> None:
    with pytest.raises(ClpError, match=message):
        run(EvaluateRequest(**ASKED | QUICK | {"checkpoints": (checkpoint,)} | change))
