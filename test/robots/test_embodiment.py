# SPDX-License-Identifier: Apache-2.0
"""Embodiments: what is shipped is right, and what contradicts itself is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from robot_tools import document, robot, states, sync

from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.jobs.make_checkpoint import embodiment_features
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.observation import joint_selector
from clp_ros.robots.trajectory import chunk_positions

SHIPPED = sorted(path.stem for path in resource_path("config/embodiments").glob("*.yaml"))


def refusal(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    broken = copy.deepcopy(document())
    change(broken)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(broken, sort_keys=False))
    with pytest.raises(ClpError) as fault:
        load_embodiment(path)
    assert str(path) in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_embodiments(name: str) -> None:
    embodiment = load_embodiment(name)
    assert embodiment.name == name
    assert embodiment.description
    assert len(embodiment.joints) == embodiment.action_size > 0
    assert set(embodiment.topics.values()) <= {
        "sensor_msgs/msg/Image",
        "sensor_msgs/msg/CompressedImage",
        "sensor_msgs/msg/JointState",
    }
    assert load_embodiment(str(resource_path(f"config/embodiments/{name}.yaml"))) == embodiment


def test_aloha_is_two_arms_of_seven() -> None:
    aloha = load_embodiment("aloha_bimanual")
    arm = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "left_finger"]
    assert [joint.name for joint in aloha.joints] == arm * 2
    assert list(aloha.controllers) == ["left_arm", "left_gripper", "right_arm", "right_gripper"]
    assert aloha.action_size == 14
    assert aloha.period_ns == 20_000_000
    assert len(aloha.topics) == 5


@pytest.mark.parametrize("name", ["ur5", "ur10e"])
def test_ur_is_an_arm_and_a_gripper(name: str) -> None:
    robot = load_embodiment(name)
    arm = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"]
    assert [joint.name for joint in robot.controllers["arm"].joints] == [f"{joint}_joint" for joint in arm]
    assert robot.controllers["arm"].topic == "/scaled_joint_trajectory_controller/joint_trajectory"
    (gripper,) = robot.controllers["gripper"].joints
    assert gripper.unit == "normalised"
    assert len(robot.cameras) == 2
    assert robot.action_size == 7
    assert robot.joint_states["ur"].description_topic == "/robot_description"


def test_single_aloha_is_the_right_arm_of_the_bimanual_one() -> None:
    single, bimanual = load_embodiment("aloha_single"), load_embodiment("aloha_bimanual")
    for name, controller in single.controllers.items():
        assert controller == bimanual.controllers[name]
    assert single.joint_states["follower_right"] == bimanual.joint_states["follower_right"]
    assert single.joint_states["follower_right"].description_topic == "/follower_right/robot_description"
    assert {camera.feature for camera in single.cameras.values()} == {
        "observation.images.cam_high",
        "observation.images.cam_right_wrist",
    }


def test_a_prefix_goes_before_every_joint() -> None:
    plain, prefixed = load_embodiment("ur5"), load_embodiment("ur5", tf_prefix="left_")
    assert [joint.name for joint in prefixed.joints] == [f"left_{joint.name}" for joint in plain.joints]
    assert prefixed.topics == plain.topics
    assert load_embodiment("ur5", tf_prefix="", topics={}) == plain


def test_topics_can_be_elsewhere() -> None:
    topics = {
        "cameras.cam_wrist": "/wrist/image/compressed",
        "joint_states.ur": "/left/joint_states",
        "controllers.arm": "/joint_trajectory_controller/joint_trajectory",
    }
    robot = load_embodiment("ur5", topics=topics)
    assert list(robot.topics) == [
        "/cam_front/camera/color/image_raw/compressed",
        "/wrist/image/compressed",
        "/left/joint_states",
    ]
    assert robot.controllers["arm"].topic == topics["controllers.arm"]
    assert robot.joint_states["ur"].description_topic == "/left/robot_description"
    described = load_embodiment("ur5", topics={"joint_states.ur.robot_description": "/urdf"})
    assert described.joint_states["ur"].description_topic == "/urdf"
    left, right = (load_embodiment("aloha_bimanual").cameras[f"cam_{side}_wrist"].topic for side in ("left", "right"))
    swapped = load_embodiment(
        "aloha_bimanual", topics={"cameras.cam_left_wrist": right, "cameras.cam_right_wrist": left}
    )
    assert swapped.cameras["cam_left_wrist"].topic == right


@pytest.mark.parametrize(
    ("topics", "message"),
    [
        ({"cameras.cam_wirst": "/a"}, "ur5 has no topic 'cameras.cam_wirst' .*did you mean 'cameras.cam_wrist'"),
        ({"cam_wrist": "/a"}, "did you mean 'cameras.cam_wrist'"),
        ({"cameras.cam_wrist": "~/a"}, "cameras.cam_wrist: .*~/a is not an absolute topic"),
        ({"cameras.cam_wrist": ""}, "cameras.cam_wrist: .*is not an absolute topic"),
        (
            {"cameras.cam_wrist": "/cam_front/camera/color/image_raw/compressed"},
            "the topic /cam_front.* is there twice",
        ),
        ({"controllers.arm": "/joint_states"}, "the topic /joint_states is there twice"),
    ],
)
def test_topics_that_do_not_fit(topics: dict[str, str], message: str) -> None:
    with pytest.raises(ClpError, match=message):
        load_embodiment("ur5", topics=topics)


def test_zero_and_one_turn_a_gripper_round(tmp_path: Path) -> None:
    turned = copy.deepcopy(document())
    turned["controllers"]["gripper"]["joints"][0] |= {"zero": 0.05, "one": 0.03}
    robot = Embodiment.model_validate(turned)
    _, values = joint_selector(robot, "arm").select(states(0, positions=[1.0, 2.0, 0.045]))
    assert values == pytest.approx([0.25, 1.0, 2.0])
    positions, limited = chunk_positions(np.array([[0.25, 1, 2], [-0.5, 1, 2], [1.6, 1, 2]]), robot)
    assert positions[:, 0] == pytest.approx([0.045, 0.06, 0.02])
    assert limited == 1

    def change(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda broken: broken["controllers"]["gripper"]["joints"][0].update(fields)

    assert "zero and one belong to unit normalised" in refusal(tmp_path, change(unit="m", zero=0.0))
    assert "zero and one must differ" in refusal(tmp_path, change(zero=0.06))
    assert "acceleration" in refusal(tmp_path, change(acceleration=0.0))


def test_vector_order_is_file_order() -> None:
    assert [joint.name for joint in robot().joints] == ["finger", "waist", "elbow"]


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ClpError, match="did you mean 'aloha_bimanual'"):
        load_embodiment("aloha_bimanua")
    with pytest.raises(ClpError, match="no such file"):
        load_embodiment(tmp_path / "none.yaml")
    with pytest.raises(ClpError, match="cannot be read"):
        load_embodiment(tmp_path)


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_limits_are_ordered(tmp_path: Path, side: str) -> None:
    def change(broken: dict[str, Any]) -> None:
        joint = broken["controllers"]["arm"]["joints"][1]
        joint[side] = joint["upper" if side == "lower" else "lower"]

    assert "'controllers.arm.joints.1': joint elbow: lower must be below upper" in refusal(tmp_path, change)


def test_names_that_clash(tmp_path: Path) -> None:
    eye = document()["cameras"]["eye"]

    def another_camera(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda broken: broken["cameras"].update(second=eye | fields)

    assert "topic /eye is there twice" in refusal(tmp_path, another_camera(feature="observation.images.b"))
    assert "feature observation.images.eye is there twice" in refusal(tmp_path, another_camera(topic="/b"))
    assert "topic /states is there twice" in refusal(
        tmp_path, another_camera(topic="/states", feature="observation.images.b")
    )

    def change(broken: dict[str, Any]) -> None:
        broken["controllers"]["arm"]["joints"][1]["name"] = "waist"

    assert "'controllers.arm': the joint waist is there twice" in refusal(tmp_path, change)

    def change(broken: dict[str, Any]) -> None:
        broken["controllers"]["arm"]["joints"][1]["name"] = "finger"

    assert "joint finger of joint_states arm has two controllers" in refusal(tmp_path, change)
    for topic in ("/gripper/joint_trajectory", "/states", "/eye"):

        def change(broken: dict[str, Any], topic: str = topic) -> None:
            broken["controllers"]["arm"]["topic"] = topic

        assert f"topic {topic} is there twice" in refusal(tmp_path, change)


def test_joint_states_are_known_and_used(tmp_path: Path) -> None:
    def change(broken: dict[str, Any]) -> None:
        broken["controllers"]["arm"]["joint_states"] = "amr"

    message = refusal(tmp_path, change)
    assert "controllers.arm.joint_states is 'amr', not one of joint_states: arm" in message

    def change(broken: dict[str, Any]) -> None:
        broken["joint_states"]["more"] = {"topic": "/more", "sync": sync()}

    assert "joint_states.more is used by no controller" in refusal(tmp_path, change)


def test_speed_scaling_names_controllers(tmp_path: Path) -> None:
    scaling = {"topic": "/speed", "controllers": ["amr"]}
    message = refusal(tmp_path, lambda broken: broken.update(speed_scaling=scaling))
    assert "mine.yaml: speed_scaling.controllers: there is no controller 'amr', did you mean 'arm'?" in message


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"policy": "asof", "stamp": "header"}, "tolerance_ms"),
        ({"policy": "hold", "tolerance_ms": 5, "stamp": "header"}, "tolerance_ms"),
        ({"policy": "asof", "tolerance_ms": 0, "stamp": "header"}, "tolerance_ms"),
        ({"policy": "asof", "tolerance_ms": float("inf"), "stamp": "header"}, "tolerance_ms"),
        ({"policy": "latest", "stamp": "header"}, "'hold', 'asof' or 'drop'"),
        ({"policy": "hold", "stamp": "arrival"}, "'header' or 'receive'"),
        ({"policy": "hold"}, "stamp': is missing"),
        ({"stamp": "header"}, "policy': is missing"),
        ({}, "policy': is missing"),
        ("hold", "must be a mapping"),
        (None, "must be a mapping"),
    ],
)
def test_sync_has_no_defaults(tmp_path: Path, wrong: Any, what: str) -> None:
    message = refusal(tmp_path, lambda broken: broken["cameras"]["eye"].update(sync=wrong))
    assert "key 'cameras.eye.sync" in message
    assert what in message
    message = refusal(tmp_path, lambda broken: broken["cameras"]["eye"].pop("sync"))
    assert "key 'cameras.eye.sync': is missing" in message


@pytest.mark.parametrize("topic", ["/eye/", "/", "/1eye", "//eye", "/eye pod", "~/eye", "", "/eye\n"])
def test_topics_are_absolute_ros_names(tmp_path: Path, topic: str) -> None:
    assert "key 'cameras.eye.topic'" in refusal(tmp_path, lambda broken: broken["cameras"]["eye"].update(topic=topic))


def test_a_topic_without_a_slash_and_a_type_in_two_parts(tmp_path: Path) -> None:
    given = document()
    given["cameras"]["eye"] |= {"topic": "eye", "type": given["cameras"]["eye"]["type"].replace("/msg/", "/")}
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(given))
    assert load_embodiment(path) == Embodiment.model_validate(document())
    assert load_embodiment(path, topics={"cameras.eye": "other/eye"}).cameras["eye"].topic == "/other/eye"
    message = refusal(tmp_path, lambda broken: broken["cameras"]["eye"].update(type="sensor_msgs/msg/PointCloud2"))
    assert "must be 'sensor_msgs/msg/Image' or 'sensor_msgs/msg/CompressedImage'" in message


@pytest.mark.parametrize("rate", [0, -1, 0.01, 1e10, float("nan"), float("inf"), "50", True])
def test_the_control_rate_is_one_a_controller_can_have(tmp_path: Path, rate: Any) -> None:
    assert "key 'control_rate_hz'" in refusal(tmp_path, lambda broken: broken.update(control_rate_hz=rate))


@pytest.mark.parametrize("part", ["cameras", "joint_states", "controllers"])
def test_nothing_is_empty(tmp_path: Path, part: str) -> None:
    assert f"key '{part}'" in refusal(tmp_path, lambda broken: broken.update({part: {}}))
    assert f"key '{part}'" in refusal(tmp_path, lambda broken: broken.update({part: None}))


def test_features_of_a_policy_for_it() -> None:
    features = embodiment_features(Embodiment.model_validate(document()))
    assert features.cameras == {"observation.images.eye": (480, 640)}
    assert features.state_size == features.action_size == 3
    assert features.action_mean == (0.5, 0.0, 0.0)
    assert features.action_std == (0.1, 200.0, 200.0)


def test_the_old_key_of_a_cameras_feature(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = copy.deepcopy(document())
    old["cameras"]["eye"]["slot"] = old["cameras"]["eye"].pop("feature")
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old))
    assert load_embodiment(path) == Embodiment.model_validate(document())
    assert caplog.messages == ["embodiment small_arm: cameras.eye.slot: the key is now 'feature'"]
    old["cameras"]["eye"]["feature"] = old["cameras"]["eye"]["slot"]
    path.write_text(yaml.safe_dump(old))
    with pytest.raises(ClpError, match=r"unknown key 'cameras\.eye\.slot'"):
        load_embodiment(path)


@pytest.mark.parametrize("name", ["ur5", "ur10e", "aloha_single", "aloha_bimanual"])
def test_the_example_of_actions_in_each_file_fits_it(name: str, tmp_path: Path) -> None:
    text = (resource_path("config/embodiments") / f"{name}.yaml").read_text()
    plain, example = text.split("# actions:\n")
    example = "actions:\n" + "\n".join(line.removeprefix("# ") for line in example.splitlines())
    if name == "aloha_bimanual":
        _, left = example.split("  topics:\n")
        example += "\n" + left.replace("left_arm", "right_arm").replace("left_grip", "right_grip").replace(
            "r_left", "r_right"
        )
    path = tmp_path / "robot.yaml"
    path.write_text(plain + example)
    robot = load_embodiment(path)
    assert robot.actions.source == "topics"
    commanded = [joint for entry in robot.actions.topics for joint in robot.commanded_joints(entry)]
    assert [joint.index for joint in commanded] == list(range(robot.action_size))
    assert load_embodiment(name).action_topics == {}
