# SPDX-License-Identifier: Apache-2.0
"""MuJoCo models of UR5e and UR10e, made from the kinematics that Universal Robots publishes.

https://www.universal-robots.com/articles/ur/application-installation/dh-parameters-for-calculations-of-kinematics-and-dynamics/
Only the positions of joints and frames are those of the real robot. The shapes are capsules, and the masses are
plausible. Gravity is compensated, as by the controller of the real robot.
"""

from __future__ import annotations

from dataclasses import dataclass

JOINTS = (
    *("shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint"),
    *("wrist_1_joint", "wrist_2_joint", "wrist_3_joint"),
)
GRIPPER = "robotiq_85_left_knuckle_joint"
# Initial positions of a UR's demonstrations, in rad: the tool points down, in front of the robot. The gripper is open.
HOME = (0.0, -1.5708, 1.5708, -1.5708, -1.5708, 0.0, 0.0)


@dataclass(frozen=True)
class Kinematics:
    """Denavit-Hartenberg parameters in metres; alpha is pi/2, 0, 0, pi/2, -pi/2, 0."""

    d1: float
    a2: float
    a3: float
    d4: float
    d5: float
    d6: float


UR5E = Kinematics(0.1625, -0.425, -0.3922, 0.1333, 0.0997, 0.0996)
UR10E = Kinematics(0.1807, -0.6127, -0.57155, 0.17415, 0.11985, 0.11655)


def model(kinematics: Kinematics) -> str:
    """Returns an MJCF document: the robot, a gripper with one joint, a table with a cube, and two cameras.

    Bodies have the names of the links in Universal_Robots_ROS2_Description. Joints and actuators have the names of the
    joints there.

    Args:
        kinematics: The robot's kinematics.
    """
    k = kinematics
    thick = 0.05 if k is UR5E else 0.065
    links = [  # name, joint, position and quaternion in the parent, the capsule's ends, radius, mass
        ("shoulder_link", "shoulder_pan_joint", (0, 0, k.d1), (1, 0, 0, 0), (0, 0, -0.06, 0, 0, 0.02), 1.3, 4.0),
        ("upper_arm_link", "shoulder_lift_joint", (0, 0, 0), _X90, (0, 0, k.d4, k.a2, 0, k.d4), 1.0, 8.0),
        ("forearm_link", "elbow_joint", (k.a2, 0, 0), (1, 0, 0, 0), (0, 0, 0.05, k.a3, 0, 0.05), 0.8, 3.0),
        ("wrist_1_link", "wrist_1_joint", (k.a3, 0, k.d4), (1, 0, 0, 0), (0, 0, -0.05, 0, 0, 0.02), 0.7, 1.5),
        ("wrist_2_link", "wrist_2_joint", (0, -k.d5, 0), _X90, (0, 0, -0.05, 0, 0, 0.02), 0.7, 1.5),
        ("wrist_3_link", "wrist_3_joint", (0, k.d6, 0), _X_90, (0, 0, -0.03, 0, 0, -0.01), 0.6, 0.4),
    ]
    opening, closing = [], []
    for name, joint, place, turn, capsule, radius, mass in links:
        opening.append(
            f'<body name="{name}" pos="{_text(place)}" quat="{_text(turn)}" gravcomp="1">'
            f'<joint name="{joint}" axis="0 0 1" damping="20" armature="0.5"/>'
            f'<geom type="capsule" fromto="{_text(capsule)}" size="{radius * thick:g}" mass="{mass:g}" class="arm"/>'
        )
        closing.append("</body>")
    actuators = "".join(f'<position name="{link[1]}" joint="{link[1]}" kp="20000" kv="400"/>' for link in links)
    return f"""<mujoco model="ur">
  <compiler angle="radian"/>
  <option timestep="0.002" integrator="implicitfast"/>
  <visual><headlight ambient="0.4 0.4 0.4"/></visual>
  <default>
    <default class="arm"><geom rgba="0.6 0.65 0.7 1" contype="0" conaffinity="0"/></default>
    <default class="finger"><geom rgba="0.15 0.15 0.15 1" mass="0.03" friction="1.5 0.01 0.001" condim="4"/></default>
  </default>
  <worldbody>
    <light pos="0.5 -0.5 2" dir="-0.2 0.2 -1" diffuse="0.7 0.7 0.7"/>
    <geom name="floor" type="plane" size="2 2 0.1" pos="0 0 -0.02" rgba="0.35 0.35 0.4 1"/>
    <geom name="table" type="box" size="0.5 0.6 0.01" pos="0.6 0 -0.01" rgba="0.75 0.65 0.5 1"/>
    <body name="cube" pos="0.5 0.1 0.02">
      <freejoint name="cube"/>
      <geom name="cube" type="box" size="0.02 0.02 0.02" mass="0.05" rgba="0.9 0.1 0.1 1" condim="4"/>
    </body>
    <camera name="cam_front" pos="1.6 0 0.7" xyaxes="0 1 0 -0.447 0 0.894" fovy="55"/>
    <body name="base_link_inertia" quat="0 0 0 1">
      <geom type="cylinder" fromto="0 0 0 0 0 {k.d1 / 2:g}" size="{1.3 * thick:g}" class="arm"/>
      {"".join(opening)}
        <camera name="cam_wrist" pos="0 -0.1 0.02" xyaxes="1 0 0 0 -0.97 0.25" fovy="65"/>
        <site name="tool" pos="0 0 0.16" size="0.005" group="4"/>
        <geom type="box" pos="0 0 0.05" size="0.06 0.025 0.045" mass="0.4" class="arm"/>
        <body name="left_finger" pos="0.06 0 0.1" gravcomp="1">
          <joint name="{GRIPPER}" axis="0 -1 0" damping="0.5" armature="0.01"/>
          <geom name="left_finger" type="box" pos="0 0 0.035" size="0.006 0.012 0.035" class="finger"/>
        </body>
        <body name="right_finger" pos="-0.06 0 0.1" gravcomp="1">
          <joint name="right_knuckle" axis="0 1 0" damping="0.5" armature="0.01"/>
          <geom name="right_finger" type="box" pos="0 0 0.035" size="0.006 0.012 0.035" class="finger"/>
        </body>
      {"".join(closing)}
    </body>
  </worldbody>
  <actuator>
    {actuators}
    <position name="{GRIPPER}" joint="{GRIPPER}" kp="20" kv="1"/>
    <position name="right_knuckle" joint="right_knuckle" kp="20" kv="1"/>
  </actuator>
</mujoco>
"""


_HALF = 2**-0.5
# Rotations by 90 and by -90 degrees about x, as quaternions.
_X90, _X_90 = (_HALF, _HALF, 0, 0), (_HALF, -_HALF, 0, 0)


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.10g}" for value in values)
