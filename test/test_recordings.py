# SPDX-License-Identifier: Apache-2.0
"""The small recording of each robot in rosbags/ is what README.md says, and can be calibrated on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosReliability
from rosbags.typesys import Stores, get_typestore

from clp_ros.bags.reader import open_bag
from clp_ros.cli import main
from clp_ros.messages.images import decode_image
from clp_ros.messages.stamps import header_stamp_ns
from clp_ros.robots.embodiment import JOINT_STATE_TYPE, load_embodiment

ROBOTS = ("ur5", "ur10e", "aloha_single")
BAGS = Path(__file__).resolve().parents[1] / "rosbags"


@pytest.mark.parametrize("name", ROBOTS)
def test_topics_rates_and_sizes(name: str) -> None:
    embodiment, folder = load_embodiment(name), BAGS / name
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {"metadata.yaml", f"{name}.mcap"}
    assert sum(files.values()) < 4_000_000
    with AnyReader([folder], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        assert {one.topic: one.msgtype for one in reader.connections} == embodiment.topics
        for one in reader.connections:
            (qos,) = one.ext.offered_qos_profiles
            reliable = one.msgtype == JOINT_STATE_TYPE
            assert qos.reliability == (QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT)
    bag = open_bag(folder)
    for topic, kind in embodiment.topics.items():
        messages = list(bag.messages([topic]))
        stamps = np.array([header_stamp_ns(message.data) for message in messages])
        rate = 100 if kind == JOINT_STATE_TYPE else 30
        assert len(stamps) == pytest.approx(9.5 * rate, abs=1)
        np.testing.assert_allclose(np.diff(stamps), 1e9 / rate, atol=1)
        delays = (np.array([message.receive_ns for message in messages]) - stamps) / 1e6
        assert 0.4 <= delays.min() < delays.max() <= (1.6 if kind == JOINT_STATE_TYPE else 10)


@pytest.mark.parametrize("name", ROBOTS)
def test_pictures_are_whole_and_show_the_red_cube_move(name: str) -> None:
    embodiment = load_embodiment(name)
    for camera in embodiment.cameras.values():
        pictures = [decode_image(message.data) for message in open_bag(BAGS / name).messages([camera.topic])]
        assert {picture.shape for picture in pictures} == {(240, 320, 3)}
        reds = [one[..., 0].astype(int) - one[..., 1:].max(axis=-1) > 90 for one in (pictures[90], pictures[-1])]
        assert reds[0].any()  # above it
        assert (reds[0] != reds[1]).sum() > 20


@pytest.mark.parametrize("name", ROBOTS)
def test_joints_are_the_robots_in_its_units_and_do_the_task(name: str) -> None:
    embodiment = load_embodiment(name)
    (topic,) = (states.topic for states in embodiment.joint_states.values())
    messages = [message.data for message in open_bag(BAGS / name).messages([topic])]
    assert len({tuple(message.name) for message in messages}) == 1
    columns = [messages[0].name.index(joint.name) for joint in embodiment.joints]
    if name.startswith("ur"):
        assert columns == list(range(7))  # the embodiment's own order
    positions = np.array([message.position for message in messages])[:, columns]
    speeds = np.array([message.velocity for message in messages])[:, columns]
    for joint, its, speed in zip(embodiment.joints, positions.T, speeds.T, strict=True):
        assert joint.lower <= its.min() <= its.max() <= joint.upper
        assert np.abs(speed).max() <= joint.velocity
        drift = np.diff(its) - (speed[1:] + speed[:-1]) / 2 * 0.01
        assert np.abs(np.cumsum(drift)).max() < 0.05 * np.ptp(its) + 0.01
    assert np.abs(np.diff(positions[:, :6], axis=0)).sum() > 2  # rad, over all joints
    closed, opened = (0.0, 1.0) if name.startswith("aloha") else (1.0, 0.0)
    shares = (positions[:, 6] - embodiment.joints[6].offset) / embodiment.joints[6].scale
    assert abs(shares[500] - opened) < 0.2
    assert abs(shares[-1] - closed) < 0.62  # around the cube, which is 24 mm from where the finger closes


@pytest.mark.parametrize("name", ROBOTS)
def test_calibration_reads_it(
    name: str, family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = family_checkpoint("smolvla", name)
    capsys.readouterr()
    files = ["--checkpoint", str(checkpoint), "--bag", str(BAGS / name), "--output", str(tmp_path / "made")]
    robot = ["--embodiment", name, "--task", "Pick up the red cube."]
    assert main(["calibrate", *files, *robot, "--samples", "2", "--device", "cpu", "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["samples"] == 2
    assert reported["embodiment"] == name
    with np.load(tmp_path / "made" / "cka.npz") as matrices:
        assert sorted(matrices) == ["expert", "vlm"]
        assert all(np.isfinite(matrices[module]).all() for module in matrices)
