# SPDX-License-Identifier: Apache-2.0
"""Limits out of robot descriptions: real ones, hostile ones, and never wider than the embodiment's."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from robot_tools import document, robot, states

from clp_ros.control.safety import Limits, OutsideError, check_measured
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.observation import joint_selector
from clp_ros.robots.trajectory import chunk_positions
from clp_ros.robots.urdf_limits import JointLimits, narrow, read_limits


def urdf(*joints: str) -> str:
    return f'<?xml version="1.0"?><robot name="r">{"".join(joints)}</robot>'


def joint(name: str, inside: str = "", kind: str = "revolute") -> str:
    return f'<joint name="{name}" type="{kind}"><axis xyz="0 0 1"/>{inside}</joint>'


def limit(lower: float, upper: float, velocity: float = 9) -> str:
    return f'<limit effort="1" lower="{lower!r}" upper="{upper!r}" velocity="{velocity!r}"/>'


WIDE = (joint("waist", limit(-2000, 2000)), joint("elbow", limit(-2000, 2000)))
FINGER = joint("finger", limit(0, 1), "prismatic")


def narrowed(*joints: str, embodiment: Embodiment | None = None) -> tuple[Embodiment, list[str]]:
    return narrow(embodiment or robot(), {"arm": urdf(*joints)}, {"arm": "/robot_description"})


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("ur5e", {"shoulder_pan_joint": math.pi, "elbow_joint": math.pi}),
        ("ur10e", {"shoulder_pan_joint": math.radians(120), "wrist_3_joint": math.pi}),
        ("aloha_vx300s", {"left_finger": 1.0, "waist": math.pi}),
    ],
)
def test_real_descriptions(shared_data: Path, file: str, names: dict[str, float]) -> None:
    limits = read_limits((shared_data / "urdf" / f"{file}.urdf").read_text(), file)
    for name, velocity in names.items():
        assert limits[name].velocity == pytest.approx(velocity)
        assert -7 < limits[name].lower < limits[name].upper < 7


def test_a_real_mimic_and_a_real_continuous_joint(shared_data: Path) -> None:
    limits = read_limits((shared_data / "urdf" / "aloha_vx300s.urdf").read_text(), "vx300s")
    assert limits["right_finger"].mimics == "left_finger"
    assert limits["gripper"] == JointLimits("continuous", velocity=pytest.approx(math.pi))
    assert limits["ee_bar"].kind == "fixed"


@pytest.mark.parametrize(
    ("inside", "kind", "expected"),
    [
        (limit(-1, 2, 3), "revolute", (-1, 2, 3)),
        (limit(-1, 2, 3), "continuous", (-math.inf, math.inf, 3)),
        ("", "continuous", (-math.inf, math.inf, math.inf)),
        ('<limit effort="1" upper="2" velocity="3"/>', "revolute", (0, 2, 3)),  # the format's default
        ('<limit effort="1" velocity="inf"/>', "continuous", (-math.inf, math.inf, math.inf)),
        (limit(-1, 2) + '<safety_controller k_velocity="1" soft_lower_limit="-0.5" soft_upper_limit="5"/>', "revolute",
         (-0.5, 2, 9)),
        (limit(-1, 2) + '<safety_controller k_velocity="1"/>', "revolute", (-1, 2, 9)),
        (limit(-1, 2) + '<safety_controller soft_lower_limit="0" soft_upper_limit="0.0"/>', "revolute", (-1, 2, 9)),
        ('<safety_controller k_velocity="1" soft_upper_limit="5"/>', "continuous", (-math.inf, math.inf, math.inf)),
    ],
)  # fmt: skip
def test_limits_by_the_rules_of_the_format(inside: str, kind: str, expected: tuple[float, float, float]) -> None:
    its = read_limits(urdf(joint("a", inside, kind)), "here")["a"]
    assert (its.lower, its.upper, its.velocity) == expected


def test_joints_of_transmissions_are_not_joints() -> None:
    text = urdf(joint("a", limit(-1, 2)), '<transmission name="t"><joint name="b"/></transmission>')
    assert set(read_limits(text, "here")) == {"a"}


BOMB = '<!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><robot name="r">&b;</robot>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not XML"),
        ("<robot", "is not XML"),
        ("\0", "is not XML"),
        ("<robot>&nbsp;</robot>", "is not XML"),
        (BOMB, "declares a DOCTYPE"),
        ('<!DOCTYPE r SYSTEM "file:///etc/passwd"><robot/>', "declares a DOCTYPE"),
        ("<sdf/>", "is a <sdf>, not a <robot>"),
        ("<robot><joint></robot>", "is not XML"),
        (urdf()[:-1], "is not XML"),
        (urdf() + "<robot/>", "is not XML"),
    ],
)
def test_what_is_no_description_is_refused_by_its_topic(text: str, message: str) -> None:
    with pytest.raises(ClpError, match=f"(?s)/arm/robot_description: .*{message}") as fault:
        read_limits(text, "/arm/robot_description")
    assert str(fault.value).count("/arm/robot_description") == 1


BAD = [
    ((limit(-1, 2).replace("2", "two"),), "its upper is 'two', which is no number"),
    ((limit(math.nan, 2),), "its lower is 'nan'"),
    ((limit(-1, 2, 0),), "its velocity limit is 0"),
    ((limit(-1, 2, -1),), "its velocity limit is -1"),
    (('<limit effort="1" lower="${-pi}" upper="${pi}" velocity="1"/>',), "its velocity|its lower is '\\$"),
    ((limit(-1, 2), limit(-1, 1)), "it is there twice, and not the same"),
]


@pytest.mark.parametrize(("limits", "message"), BAD)
@pytest.mark.parametrize("kind", ["revolute", "continuous", "prismatic", "fixed", "floating"])
def test_what_is_wrong_with_a_joint_matters_if_it_is_driven(limits: tuple[str, ...], message: str, kind: str) -> None:
    others = [joint("camera_mount", one, kind) for one in limits]
    assert narrowed(FINGER, *WIDE, *others) == narrowed(FINGER, *WIDE)
    with pytest.raises(ClpError, match=f"/robot_description: joint 'elbow' of the robot description: {message}"):
        narrowed(FINGER, WIDE[0], *(joint("elbow", one) for one in limits))


def test_a_joint_that_is_there_twice_in_the_same_way_is_one() -> None:
    assert narrowed(FINGER, *WIDE, WIDE[0]) == narrowed(FINGER, *WIDE)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"\n{text}",
        lambda text: f"\ufeff \r\n\t{text}\n",
        lambda text: f"\ufeff<!-- Copyright -- of the maker -->\n{text}",
        lambda text: text.replace("<robot", "<!-- made by xacro -->\n<robot"),
        lambda text: text.replace("?>", '?><!-- <!DOCTYPE robot> "sensor--coarse.stl" --->'),
        lambda text: text.replace('version="1.0"', 'version="1.0" encoding="ascii"'),
        lambda text: text.replace(
            "<robot", '<robot xmlns="http://www.ros.org" xmlns:xacro="http://ros.org/wiki/xacro"'
        ),
        lambda text: text.replace("</robot>", '<xacro:arm prefix="${p}"/><gazebo><sensor:camera/></gazebo></robot>'),
        lambda text: text.replace('type="revolute"', 'type="revolute" xacro:name="w"'),
        lambda text: text.replace("</robot>", '<gazebo><joint name="waist" velocity="0"/></gazebo></robot>'),
        lambda text: text.replace("</robot>", '<ros2_control><joint name="waist"/></ros2_control></robot>'),
    ],
)
def test_what_xacro_and_launch_files_leave_behind_is_no_fault(change: Callable[[str], str]) -> None:
    text = urdf(FINGER, joint("waist", limit(-1, 2, 0.5)), WIDE[1])
    after = narrow(robot(), {"arm": change(text)}, {"arm": "here"})
    assert after == narrow(robot(), {"arm": text}, {"arm": "here"})
    assert after[1] == ["arm, waist: lower -1000 -> -1, upper 1000 -> 2, velocity 1 -> 0.5"]


@pytest.mark.parametrize("name", ["plain", "fixed", "wheel"])
def test_descriptions_with_joints_that_do_not_move(shared_data: Path, name: str) -> None:
    text = (shared_data / "cases" / "urdf" / f"{name}.urdf").read_text()
    after, lines = narrow(load_embodiment("ur5"), {"ur": text}, {"ur": name})
    assert after.joints[0].upper == 6.28
    assert len(lines) == 6


number = st.floats(-1500, 1500)


@given(number, number, st.floats(0.01, 10))
def test_limits_get_narrower_and_never_wider(one: float, other: float, velocity: float) -> None:
    lower, upper = min(one, other), max(one, other)
    before, joints = robot(), (FINGER, joint("waist", limit(lower, upper, velocity)), WIDE[1])
    if lower >= 1000 or upper <= -1000 or lower == upper:
        with pytest.raises(ClpError, match="do not overlap"):
            narrowed(*joints)
        return
    after, lines = narrowed(*joints)
    waist = after.controllers["arm"].joints[0]
    assert waist == after.joints[1]
    assert (waist.lower, waist.upper) == (max(lower, -1000), min(upper, 1000))
    assert waist.velocity == min(velocity, 1.0)
    assert after.joints[2] == before.joints[2]
    assert any("waist" in line for line in lines) == (
        waist.lower > -999.9999 or waist.upper < 999.9999 or velocity < 0.9999
    )


def test_the_units_of_a_normalised_joint_stay() -> None:
    after, lines = narrowed(joint("finger", limit(0.03, 0.05), "prismatic"), *WIDE)
    assert lines == ["gripper, finger: lower 0.02 -> 0.03, upper 0.06 -> 0.05"]
    for embodiment in (robot(), after):
        _, values = joint_selector(embodiment, "arm").select(states(0))
        assert values[0] == pytest.approx(0.5)
    positions, limited = chunk_positions(np.array([[0.5, 0, 0], [0.0, 0, 0], [1.0, 0, 0]]), after)
    assert positions[:, 0] == pytest.approx([0.04, 0.03, 0.05])
    assert limited == 2
    again, lines = narrow(after, {"arm": urdf(FINGER, *WIDE)}, {"arm": "x"})
    assert (again, lines) == (after, [])


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        (
            (FINGER, WIDE[0]),
            "small_arm has a joint 'elbow', but its robot description has none.*robot_description_wait",
        ),
        ((FINGER, WIDE[0], joint("left_elbow")), "none of this name.*did you mean 'left_elbow'.*tf_prefix"),
        ((joint("finger", '<mimic joint="thumb"/>'), *WIDE), "drives the joint 'finger', which follows 'thumb'"),
        ((FINGER, WIDE[0], joint("elbow", kind="fixed")), "drives the joint 'elbow', which is fixed"),
        ((FINGER, WIDE[0], joint("elbow", kind="planar")), "drives the joint 'elbow', whose type is 'planar'"),
        ((FINGER, WIDE[0], joint("elbow", kind="Revolute")), "drives the joint 'elbow', whose type is 'Revolute'"),
        (
            (joint("finger", limit(0.1, 0.2)), *WIDE),
            "the limits of joint 'finger' do not overlap: 0.02 … 0.06 in small_arm, 0.1 … 0.2",
        ),
        ((joint("finger", '<limit effort="1" velocity="1"/>'), *WIDE), "do not overlap: .*0 … 0 in its"),
    ],
)
def test_a_description_of_another_robot_is_refused(joints: tuple[str, ...], message: str) -> None:
    with pytest.raises(ClpError, match=message) as fault:
        narrowed(*joints)
    assert "/robot_description" in str(fault.value)


def test_without_a_description_the_limits_stay() -> None:
    assert narrow(robot(), {}, {}) == (robot(), [])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ur5", "ur5e"),
        ("ur10e", "ur10e"),
        ("aloha_single", "aloha_vx300s"),
        ("aloha_bimanual", "aloha_vx300s"),
    ],
)
def test_the_shipped_robots_fit_their_descriptions(shared_data: Path, name: str, file: str) -> None:
    text = (shared_data / "urdf" / f"{file}.urdf").read_text()
    gripper = joint("robotiq_85_left_knuckle_joint", limit(0.0, 0.8, 0.5))
    text = text.replace("</robot>", f"{gripper}</robot>") if name.startswith("ur") else text
    embodiment = load_embodiment(name)
    sources = dict.fromkeys(embodiment.joint_states, text)
    after, lines = narrow(embodiment, sources, dict.fromkeys(sources, file))
    # ALOHA's fingers move a little farther than their description says.
    assert all(re.search(r"left_finger: lower 0.01844 -> 0.021, upper 0.058 -> 0.057", line) for line in lines)
    assert len(lines) == {"aloha_single": 1, "aloha_bimanual": 2}.get(name, 0)
    for its, shipped in zip(after.joints, embodiment.joints, strict=True):
        beyond = 3e-3 if its.name == "left_finger" else 1e-4
        assert (its.lower, its.upper) == pytest.approx((shipped.lower, shipped.upper), abs=beyond)
        described = read_limits(text, file)[its.name]
        # And they are those limits, not just any inside them.
        assert shipped.upper - shipped.lower > 0.999 * (described.upper - described.lower), its.name
        assert shipped.velocity == pytest.approx(described.velocity, abs=1e-4), its.name


def test_a_prefix_is_the_descriptions(shared_data: Path) -> None:
    text = (shared_data / "urdf" / "ur10e.urdf").read_text().replace('joint name="', 'joint name="left_')
    text = text.replace("</robot>", joint("left_robotiq_85_left_knuckle_joint", limit(0.0, 0.7, 0.4)) + "</robot>")
    _, lines = narrow(load_embodiment("ur10e", tf_prefix="left_"), {"ur": text}, {"ur": "here"})
    assert lines == ["gripper, left_robotiq_85_left_knuckle_joint: upper 0.8 -> 0.7, velocity 0.5 -> 0.4"]
    with pytest.raises(ClpError, match=r"'shoulder_pan_joint'.*did you mean 'left_shoulder_pan_joint'.*tf_prefix"):
        narrow(load_embodiment("ur10e"), {"ur": text}, {"ur": "here"})


@pytest.mark.parametrize("name", ["aloha_single", "aloha_bimanual"])
@pytest.mark.parametrize("is_described", [False, True])
def test_a_stock_alohas_fingers_are_inside_their_limits(shared_data: Path, name: str, is_described: bool) -> None:
    embodiment = load_embodiment(name)
    if is_described:
        text = (shared_data / "urdf" / "aloha_vx300s.urdf").read_text()
        sources = dict.fromkeys(embodiment.joint_states, text)
        embodiment, _ = narrow(embodiment, sources, sources)
    limits, fingers = Limits.of(embodiment), [its.name == "left_finger" for its in embodiment.joints]
    # ALOHA's and Interbotix's constants, closed and open; then the same angles (0.6197 and 1.6214 rad) by the linkage
    # that its driver has for the aloha_vx300s, whose horn is longer (27.5 and 35 instead of 22 and 36 mm).
    for finger in (0.01844, 0.058, 0.0440, 0.0579, 0.04288, 0.0625):
        check_measured(np.where(fingers, finger, 0.0), limits)
    # Radians of the motor, and the right finger.
    for finger in (0.6197, 1.6214, -0.03, 0.0):
        with pytest.raises(OutsideError, match="left_finger"):
            check_measured(np.where(fingers, finger, 0.0), limits)
    normalised = embodiment.joints[6]
    assert (0.01844 - normalised.offset, 0.058 - normalised.offset) == pytest.approx((0.0, normalised.scale))


@pytest.mark.parametrize(
    ("limits", "unit", "tolerance", "allowed"),
    [
        ((-3.0, 3.0), "rad", None, 0.3),
        ((0.0, 0.3), "rad", None, 0.05),
        ((0.0, 0.04), "m", None, 0.005),
        ((0.0, 0.04), "normalised", None, 0.005),
        ((0.0, 0.8), "normalised", None, 0.04),
        ((0.0, 0.04), "m", 0.001, 0.001),
        ((-3.0, 3.0), "rad", 0.5, 0.5),
    ],
)
def test_how_far_beyond_its_limits_a_joint_may_report_to_be(
    limits: tuple[float, float], unit: str, tolerance: float | None, allowed: float
) -> None:
    its = {"name": "a", "lower": limits[0], "upper": limits[1], "velocity": 1.0, "unit": unit}
    its |= {} if tolerance is None else {"tolerance": tolerance}
    one = document()
    one["controllers"] = {"arm": one["controllers"]["arm"] | {"joints": [its]}}
    given = Limits.of(Embodiment.model_validate(one))
    for inside in (limits[0] - 0.999 * allowed, limits[1] + 0.999 * allowed):
        check_measured(np.array([inside]), given)
    for outside in (limits[0] - 1.001 * allowed, limits[1] + 1.001 * allowed):
        with pytest.raises(OutsideError, match=f"by more than {allowed:g}"):
            check_measured(np.array([outside]), given)
