# SPDX-License-Identifier: Apache-2.0
"""``clp record``: demonstrations of a simulated robot as bags, without ROS."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clp_ros.bags.reader import open_bag
from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.messages.images import decode_image
from clp_ros.messages.stamps import header_stamp_ns
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation import recording

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation's packages are in requirements-simulation.txt", allow_module_level=True)
from clp_ros.simulation.robot import SimulatedRobot

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--camera-rate", "2", "--size", "32x24")
QUICK = recording.RecordingSettings(camera_rate=2.0, size=(32, 24))


@pytest.fixture(scope="module", autouse=True)
def drawing() -> None:
    robot = SimulatedRobot(load_embodiment("ur5"))
    try:
        robot.picture("cam_front", 24, 32)
    except ClpError as error:
        pytest.skip(str(error))
    finally:
        robot.close()


def record(output: Path, *arguments: str, embodiment: str = "ur5") -> int:
    return main(["record", "--embodiment", embodiment, "--output", str(output), *FEW, *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def positions(bag: Path, topic: str = "/joint_states") -> np.ndarray:
    """(messages, joints)"""
    return np.array([message.data.position for message in open_bag(bag).messages([topic])])


def test_a_seed_is_a_recording_and_every_episode_begins_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(tmp_path / "one", "--episodes", "2", "--seed", "5", "--json") == 0
    reported = json.loads(capsys.readouterr().out)
    bags = [tmp_path / "one" / f"episode_00{index}" for index in range(2)]
    assert [one["bag"] for one in reported["episodes"]] == [str(bag) for bag in bags]
    assert reported["solved"] == len(bags)
    assert reported["bytes"] == sum(map(len, contents(tmp_path / "one").values()))
    assert sorted(path.name for path in bags[1].iterdir()) == ["episode_001.mcap", "metadata.yaml"]

    assert record(tmp_path / "again", "--episodes", "2", "--seed", "5") == 0
    assert capsys.readouterr().out.startswith("2 episodes, all solved; ")
    assert contents(tmp_path / "again") == contents(tmp_path / "one")

    home = SimulatedRobot(load_embodiment("ur5")).home
    starts = [positions(bag)[0] for bag in (*bags, ROOT / "rosbags" / "ur5")]  # which has another seed
    for start in starts:
        away = np.abs(start - home)
        assert 0.01 < away[:6].max() < 0.11
        assert away[6] < 0.01  # the gripper is open
    assert all(np.abs(one - other).max() > 0.01 for one, other in pairwise(starts))
    # The cube lies elsewhere, so the arm goes elsewhere.
    assert np.abs(positions(bags[0])[-1] - positions(bags[1])[-1]).max() > 0.05


@pytest.mark.parametrize("name", ["ur5", "aloha_bimanual"])
def test_every_topic_of_the_robot_is_recorded(name: str, tmp_path: Path) -> None:
    embodiment = load_embodiment(name)
    (episode,) = recording.record(embodiment, tmp_path / "bag", settings=QUICK)
    bag = open_bag(episode.bag)
    assert {topic.name: topic.type for topic in bag.topics.values()} == embodiment.topics
    assert {topic.name: topic.count for topic in bag.topics.values()} == episode.messages
    received, stamps = [], {topic: [] for topic in embodiment.topics}
    for message in bag.messages():
        received.append(message.receive_ns)
        stamps[message.topic].append(header_stamp_ns(message.data))
    assert received == sorted(received)
    for topic, its in stamps.items():
        rate = 100 if topic.endswith("joint_states") else 2
        np.testing.assert_allclose(np.diff(its), 1e9 / rate, atol=1)
        assert len(its) == pytest.approx(episode.seconds * rate, abs=1)
    firsts = [its[0] for its in stamps.values()]
    assert len(set(firsts)) == len(firsts)  # no two are in step


def test_raw_images_where_the_robot_has_them(tmp_path: Path) -> None:
    document = load_embodiment("ur5").model_dump()
    document["cameras"]["cam_front"]["type"] = "sensor_msgs/msg/Image"
    embodiment = type(load_embodiment("ur5")).model_validate(document)
    recording.record(embodiment, tmp_path / "bag", settings=QUICK)
    front, wrist = (camera.topic for camera in embodiment.cameras.values())
    first = {message.topic: message.data for message in open_bag(tmp_path / "bag").messages([front, wrist])}
    assert first[front].encoding == "rgb8"
    assert decode_image(first[front]).shape == decode_image(first[wrist]).shape == (24, 32, 3)
    assert decode_image(first[front]).std() > 10


def test_an_unsolved_start_is_drawn_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, answers = recording.solved, iter([False])
    monkeypatch.setattr(recording, "solved", lambda robot: next(answers, None) is None and real(robot))
    assert record(tmp_path / "bag") == 0
    assert "1 episode, all solved; 1 start left out, not solved; " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "bag").iterdir()) == ["bag.mcap", "metadata.yaml"]

    def out_of_reach(robot: SimulatedRobot) -> None:
        raise ValueError("tool does not reach")

    monkeypatch.setattr(recording, "demonstration", out_of_reach)
    assert record(tmp_path / "none", "--seed", "7") == 1
    error = capsys.readouterr().err
    assert "--seed 7: the expert does not solve episode 0 in 10 starts" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]


def test_the_folder_that_one_stands_in_may_be_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "recorded here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert record(Path(), "--json") == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(here)
    assert sorted(path.suffix for path in here.iterdir()) == [".mcap", ".yaml"]
    monkeypatch.chdir(tmp_path)  # the old folder is no more


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clp_ros.cli", "record", "--embodiment", "ur5", "--episodes", "50", *FEW]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "bags")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".bags.*/episode_001")):  # the second is on its way
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "interrupted; nothing half-written was left behind\n"
    assert not list(tmp_path.iterdir())


def test_faults_are_told_before_anything_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert record(tmp_path / "there") == 1
    assert "the output folder is not empty" in capsys.readouterr().err
    assert record(tmp_path / "new", embodiment="ur6") == 1
    assert "unknown embodiment 'ur6'" in capsys.readouterr().err
    for wrong in (["--episodes", "0"], ["--camera-rate", "nan"], ["--size", "320"], ["--quality", "101"]):
        with pytest.raises(SystemExit) as stopped:
            record(tmp_path / "new", *wrong)
        assert stopped.value.code == 2
        assert wrong[1] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["ur5", "ur10e", "aloha_single"])
def test_the_shipped_recordings_are_what_the_command_makes(name: str, tmp_path: Path) -> None:
    recording.record(load_embodiment(name), tmp_path / name, settings=QUICK)
    (topic,) = (states.topic for states in load_embodiment(name).joint_states.values())
    # Another processor may differ in the last digits.
    np.testing.assert_allclose(positions(tmp_path / name, topic), positions(ROOT / "rosbags" / name, topic), atol=0.01)
