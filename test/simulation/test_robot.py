# SPDX-License-Identifier: Apache-2.0
"""The simulated robots: their kinematics are the published ones, and they are what their embodiment says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.trajectory import split_trajectory
from clp_ros.robots.urdf_limits import narrow

if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
    pytest.skip("the simulation's packages are in requirements-simulation.txt", allow_module_level=True)
from clp_ros.simulation.description import robot_description
from clp_ros.simulation.experts import demonstration, solved
from clp_ros.simulation.model import load_mujoco
from clp_ros.simulation.robot import SimulatedRobot

ROBOTS = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")
START_NS = 10**9
LINKS = ("shoulder_link", "upper_arm_link", "forearm_link", "wrist_1_link", "wrist_2_link", "wrist_3_link")


def transform(origin: ElementTree.Element | None) -> np.ndarray:
    found = np.eye(4)
    if origin is not None:
        found[:3, 3] = [float(value) for value in origin.get("xyz", "0 0 0").split()]
        rpy = [float(value) for value in origin.get("rpy", "0 0 0").split()]
        found[:3, :3] = Rotation.from_euler("xyz", rpy).as_matrix()
    return found


def urdf_pose(joints: dict[str, ElementTree.Element], link: str, positions: dict[str, float]) -> np.ndarray:
    """The pose of a link in the first one's frame, (4, 4)."""
    joint = joints.get(link)
    if joint is None:
        return np.eye(4)
    pose = transform(joint.find("origin"))
    if joint.get("type") != "fixed":
        axis = np.array([float(value) for value in joint.find("axis").get("xyz").split()])
        way = axis * positions[joint.get("name")]
        moved = np.eye(4)
        if joint.get("type") == "prismatic":
            moved[:3, 3] = way
        else:
            moved[:3, :3] = Rotation.from_rotvec(way).as_matrix()
        pose = pose @ moved
    return urdf_pose(joints, joint.find("parent").get("link"), positions) @ pose


@pytest.mark.parametrize(("name", "urdf"), [("ur5", "ur5e"), ("ur10e", "ur10e")])
def test_forward_kinematics_are_those_of_the_published_description(name: str, urdf: str, shared_data: Path) -> None:
    file = shared_data / "urdf" / f"{urdf}.urdf"
    if not file.is_file():
        pytest.skip(f"no {file}")
    joints = {joint.find("child").get("link"): joint for joint in ElementTree.parse(file).getroot().findall("joint")}
    robot = SimulatedRobot(load_embodiment(name))
    names = [joint.name for joint in robot.embodiment.joints][:6]
    rng = np.random.default_rng(0)
    for _ in range(30):
        positions = dict(zip(names, rng.uniform(-np.pi, np.pi, 6), strict=True))
        for joint, position in positions.items():
            robot.data.joint(joint).qpos[0] = position
        load_mujoco().mj_kinematics(robot.mujoco_model, robot.data)
        for link in LINKS:
            expected = urdf_pose(joints, link, positions)
            np.testing.assert_allclose(robot.data.body(link).xpos, expected[:3, 3], atol=1e-3)
            np.testing.assert_allclose(robot.data.body(link).xmat.reshape(3, 3), expected[:3, :3], atol=1e-3)


@pytest.mark.parametrize("name", ROBOTS)
def test_its_description_has_the_models_kinematics_and_the_embodiments_limits(name: str) -> None:
    embodiment = load_embodiment(name, "left_")
    robot = SimulatedRobot(embodiment)
    model = robot.mujoco_model
    documents = {source: robot_description(robot, [source]) for source in embodiment.joint_states}
    _, narrower = narrow(embodiment, documents, dict.fromkeys(documents, "the simulated robot"))
    assert not narrower  # nor is a joint missing
    rng = np.random.default_rng(0)
    for source, document in documents.items():
        root = ElementTree.fromstring(document)
        joints = {joint.find("child").get("link"): joint for joint in root.findall("joint")}
        links = {link.get("name") for link in root.findall("link")}
        assert links == {*joints, "world"}
        positions: dict[str, float] = {}
        owners = [one.joint_states for one in embodiment.controllers.values() for _ in one.joints]
        for owner, joint, modelled in zip(owners, embodiment.joints, robot.modelled_joints, strict=True):
            if owner == source:
                positions[joint.name] = rng.uniform(joint.lower, joint.upper)
                for moved, gain in modelled.driven:
                    robot.data.joint(moved).qpos[0] = gain * positions[joint.name]
        for joint in root.findall("joint[mimic]"):
            mimic, limit = joint.find("mimic"), joint.find("limit")
            position = float(mimic.get("multiplier")) * positions[mimic.get("joint")]
            assert float(limit.get("lower")) - 1e-9 <= position <= float(limit.get("upper")) + 1e-9
            positions[joint.get("name")] = position
        load_mujoco().mj_kinematics(model, robot.data)
        for link in joints:
            expected = robot.data.body(link.removeprefix("left_"))
            found = urdf_pose(joints, link, positions)
            np.testing.assert_allclose(found[:3, 3], expected.xpos, atol=1e-6)
            np.testing.assert_allclose(found[:3, :3], expected.xmat.reshape(3, 3), atol=1e-6)
        assert len(positions) == 8  # six joints, a finger, and the one that follows it


@pytest.mark.parametrize("name", ROBOTS)
def test_it_goes_where_it_is_sent_and_says_so(name: str) -> None:
    embodiment = load_embodiment(name)
    robot = SimulatedRobot(embodiment)
    robot.step(START_NS)
    np.testing.assert_allclose(robot.measured(), robot.home, atol=1e-3)
    goal = robot.home + 0.1 * np.where([joint.unit == "normalised" for joint in embodiment.joints], 0.1, 1.0)
    for trajectory in split_trajectory(np.array([1.0]), goal[None], embodiment):
        robot.receive(trajectory, START_NS)
    for ms in range(0, 2000, 100):
        robot.step(START_NS + ms * 1_000_000)
    np.testing.assert_allclose(robot.commanded().positions, goal)
    np.testing.assert_allclose(robot.measured(), goal, atol=0.02)  # servos that droop a little
    measured = dict(zip([joint.name for joint in embodiment.joints], robot.measured(), strict=True))
    if name != "aloha_bimanual":  # both of its arms have the same names
        (source,) = embodiment.joint_states
        names, positions, speeds = robot.joint_states(source)
        assert measured.items() <= dict(zip(names, positions, strict=True)).items()
        assert len(speeds) == len(names) == len(set(names))
    else:
        assert len(robot.joint_states("follower_left")[0]) == 9


@pytest.mark.parametrize("name", ROBOTS)
def test_the_expert_solves_the_task_wherever_the_cube_lies(name: str) -> None:
    embodiment = load_embodiment(name)
    robot = SimulatedRobot(embodiment)
    places = set()
    for seed in range(2):
        robot.reset(seed)
        places.add(tuple(robot.cube()))
        robot.step(START_NS)
        motion = demonstration(robot)
        times = np.arange(1, round(motion.seconds * 50) + 1) / 50
        lower, upper = (np.array([getattr(joint, side) for joint in embodiment.joints]) for side in ("lower", "upper"))
        positions = motion.at(times)
        assert (positions >= lower - 1e-9).all()
        assert (positions <= upper + 1e-9).all()
        fastest = np.array([joint.velocity for joint in embodiment.joints])
        assert (np.abs(np.diff(positions, axis=0)) * 50 <= fastest).all()
        for trajectory in split_trajectory(times, positions, embodiment):
            robot.receive(trajectory, START_NS)
        assert not solved(robot)
        for step in range(round(motion.seconds * 5) + 3):
            robot.step(START_NS + step * 200_000_000)
        assert solved(robot)
    assert len(places) == 2


def test_a_tf_prefix_and_other_topics_change_nothing_but_names() -> None:
    embodiment = load_embodiment("ur5", "left_", {"cameras.cam_wrist": "/elsewhere"})
    robot = SimulatedRobot(embodiment)
    assert robot.joint_states("ur")[0][0] == "left_shoulder_pan_joint"


def test_other_robots_are_refused() -> None:
    other = load_embodiment("ur5").model_dump() | {"name": "ur3"}
    with pytest.raises(ClpError, match="no simulated ur3"):
        SimulatedRobot(Embodiment.model_validate(other))
    document = load_embodiment("ur5").model_dump()
    document["cameras"]["cam_left"] = document["cameras"].pop("cam_front")
    with pytest.raises(ClpError, match="no camera 'cam_left'"):
        SimulatedRobot(Embodiment.model_validate(document))
    document = load_embodiment("ur5").model_dump()
    document["controllers"]["arm"]["joints"].reverse()
    with pytest.raises(ClpError, match="has the joints"):
        SimulatedRobot(Embodiment.model_validate(document))


def test_pictures_show_the_scene_where_something_can_be_drawn() -> None:
    robot = SimulatedRobot(load_embodiment("ur5"))
    try:
        before = robot.picture("cam_front", 48, 64)
    except ClpError as error:
        pytest.skip(str(error))
    assert before.shape == (48, 64, 3)
    assert before.dtype == np.uint8
    assert before.std() > 10
    np.testing.assert_array_equal(robot.picture("cam_front", 48, 64), before)
    robot.reset(1)
    assert (robot.picture("cam_front", 48, 64) != before).any()
    robot.close()


def test_without_a_drawing_library_it_moves_and_only_pictures_are_refused() -> None:
    code = (
        "import numpy\n"
        "from clp_ros.robots.embodiment import load_embodiment\n"
        "from clp_ros.simulation.robot import SimulatedRobot\n"
        "robot = SimulatedRobot(load_embodiment('aloha_single'))\n"
        "robot.step(10**9); robot.step(11 * 10**8)\n"
        "print(robot.measured().shape)\n"
        "robot.picture('cam_high', 48, 64)\n"
    )
    environment = os.environ | {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa", "LD_LIBRARY_PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "(7,)" in found.stdout, found.stderr
    if not found.returncode:
        pytest.skip("OSMesa is there")
    assert "MuJoCo cannot draw here" in found.stderr
    assert "MUJOCO_GL=osmesa" in found.stderr
