# SPDX-License-Identifier: Apache-2.0
"""The committed demonstration is what rosbags/README.md says, read with PyPI's rosbags and nothing of clp_ros."""

import itertools
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosReliability
from rosbags.typesys import Stores, get_typestore

ROOT = Path(__file__).resolve().parents[1]
BAG = ROOT / "rosbags" / "aloha_bimanual"
CAMERAS = [f"/{name}/color/image_rect_raw/compressed" for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")]
ARMS = ["/follower_left/joint_states", "/follower_right/joint_states"]
# facts of ALOHA's followers, in the order in which Interbotix publishes the joints
LIMITS = {
    "waist": (-np.pi, np.pi),
    "shoulder": (-1.850, 1.257),
    "elbow": (-1.763, 1.606),
    "forearm_roll": (-np.pi, np.pi),
    "wrist_angle": (-1.868, 2.234),
    "wrist_rotate": (-np.pi, np.pi),
    "gripper": (0.6197, 1.6214),
    "left_finger": (0.021, 0.057),
    "right_finger": (-0.057, -0.021),
}


@dataclass
class Recording:
    """Everything in the bag, by topic, in the order of receipt."""

    messages: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    received: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    order: list[int] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    reliability: dict[str, list[QosReliability]] = field(default_factory=dict)

    def stamps(self, topic: str) -> np.ndarray:
        return np.array([m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in self.messages[topic]])

    def joints(self, topic: str, quantity: str = "position") -> np.ndarray:
        return np.array([getattr(message, quantity) for message in self.messages[topic]])


@pytest.fixture(scope="module")
def recording() -> Recording:
    result = Recording()
    with AnyReader([BAG], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        for connection in reader.connections:
            result.types[connection.topic] = connection.msgtype
            result.reliability[connection.topic] = [qos.reliability for qos in connection.ext.offered_qos_profiles]
        for connection, receive, raw in reader.messages():
            result.messages[connection.topic].append(reader.deserialize(raw, connection.msgtype))
            result.received[connection.topic].append(receive)
            result.order.append(receive)
    return result


def pictures(recording: Recording, topic: str) -> np.ndarray:
    """All pictures of a camera, (N, H, W, 3) BGR."""
    return np.stack([cv2.imdecode(message.data, cv2.IMREAD_COLOR) for message in recording.messages[topic]])


def red(picture: np.ndarray) -> np.ndarray:
    blue, green, red = (picture[..., channel].astype(int) for channel in range(3))
    return red - np.maximum(blue, green) > 90


def test_folder_is_a_small_bag_and_nothing_else() -> None:
    files = {path.name: path.stat().st_size for path in BAG.iterdir()}
    assert set(files) == {"metadata.yaml", "aloha_bimanual.mcap"}
    assert sum(files.values()) < 5_000_000


def test_topics_types_counts_and_qos(recording: Recording) -> None:
    expected = dict.fromkeys(CAMERAS, "sensor_msgs/msg/CompressedImage") | dict.fromkeys(
        ARMS, "sensor_msgs/msg/JointState"
    )
    assert recording.types == expected
    counts = {topic: len(messages) for topic, messages in recording.messages.items()}
    assert counts == dict.fromkeys(CAMERAS, 225) | dict.fromkeys(ARMS, 450)
    assert all(recording.reliability[topic] == [QosReliability.BEST_EFFORT] for topic in CAMERAS)
    assert all(recording.reliability[topic] == [QosReliability.RELIABLE] for topic in ARMS)


@pytest.mark.parametrize(("topics", "period_ms"), [(CAMERAS, 40), (ARMS, 20)])
def test_header_stamps_keep_the_rate(recording: Recording, topics: list[str], period_ms: int) -> None:
    for topic in topics:
        assert set(np.diff(recording.stamps(topic))) == {period_ms * 10**6}


def test_messages_are_received_in_order_and_soon_after_their_stamp(recording: Recording) -> None:
    assert recording.order == sorted(recording.order)
    for topics, shortest_ms, longest_ms in ((CAMERAS, 4, 10), (ARMS, 0.4, 1.6)):
        for topic in topics:
            delays = (np.array(recording.received[topic]) - recording.stamps(topic)) / 1e6
            assert shortest_ms <= delays.min() < delays.max() <= longest_ms
            assert len(np.unique(delays)) > 100


def test_no_two_topics_are_stamped_in_step(recording: Recording) -> None:
    for one, other in itertools.combinations([*CAMERAS, *ARMS], 2):
        assert not set(recording.stamps(one)) & set(recording.stamps(other))


def test_pictures_decode_and_say_which_camera_took_them(recording: Recording) -> None:
    for topic in CAMERAS:
        assert pictures(recording, topic).shape == (225, 240, 320, 3)
        frame = f"{topic.split('/')[1]}_color_optical_frame"
        assert {(m.format, m.header.frame_id) for m in recording.messages[topic]} == {
            ("rgb8; jpeg compressed bgr8", frame)
        }


def test_cube_goes_from_the_right_arm_to_the_left(recording: Recording) -> None:
    high = pictures(recording, CAMERAS[0])
    columns, rows = ([np.argwhere(red(high[index]))[:, axis].mean() for index in (0, -1)] for axis in (1, 0))
    assert columns[1] < 145 < 170 < columns[0]  # of 320: the right arm stands on the right
    assert 120 < rows[0] < 160
    # Both wrists see it in the middle while both hold it (at 70 % of the time); in the end the left one still does.
    left, right = (red(pictures(recording, topic))[:, 80:160, 110:210].mean(axis=(1, 2)) for topic in CAMERAS[1:])
    assert min(left[158], right[158], left[-1]) > 0.5
    assert max(left[0], right[0], right[-1]) < 0.2


def test_every_camera_sees_motion(recording: Recording) -> None:
    for topic in CAMERAS:
        seconds = pictures(recording, topic)[::25].astype(int)
        changed = (np.abs(np.diff(seconds, axis=0)).max(axis=-1) > 40).mean(axis=(1, 2))
        assert (changed > 0.01).sum() >= 5, (topic, changed)


def test_joints_are_named_and_within_the_real_arms_limits(recording: Recording) -> None:
    low, high = np.array(list(LIMITS.values())).T
    for topic in ARMS:
        assert {tuple(message.name) for message in recording.messages[topic]} == {tuple(LIMITS)}
        positions = recording.joints(topic)
        assert ((low <= positions) & (positions <= high)).all()
        assert (np.abs(recording.joints(topic, "velocity")[:, :6]) < np.pi).all()
        assert recording.joints(topic, "effort").size == 0


def test_gripper_follows_the_fingers(recording: Recording) -> None:
    for topic in ARMS:
        gripper, left, right = recording.joints(topic)[:, 6:].T
        np.testing.assert_array_equal(left, -right)
        share = (left - 0.021) / (0.057 - 0.021)
        np.testing.assert_allclose(gripper, 0.6197 + share * (1.6214 - 0.6197), atol=1e-12)
        assert share.min() < 0.05 < 0.95 < share.max()  # closed and open


def test_velocities_are_the_positions_derivatives(recording: Recording) -> None:
    for topic in ARMS:
        moved = np.diff(recording.joints(topic), axis=0)
        velocities = recording.joints(topic, "velocity")
        integrated = (velocities[:-1] + velocities[1:]) / 2 * 0.02
        # Joints stick and slip, so a single step may be off; what is integrated over the episode may not.
        drift = np.abs(np.cumsum(moved - integrated, axis=0)).max(axis=0)
        assert (drift < 0.05 * np.ptp(recording.joints(topic), axis=0) + 0.01).all(), drift


def test_both_arms_move(recording: Recording) -> None:
    for topic in ARMS:
        assert np.abs(np.diff(recording.joints(topic)[:, :6], axis=0)).sum() > 4  # rad, over all joints


def test_data_folder_does_not_hide_the_package_of_the_same_name() -> None:
    assert not list((ROOT / "rosbags").rglob("__init__.py"))
    # From the repository's root, where a script or `python -m pytest` finds the data folder first.
    code = "import rosbags.highlevel, rosbags; print(len(rosbags.__path__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 2
