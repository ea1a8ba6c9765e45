# SPDX-License-Identifier: Apache-2.0
"""The description (URDF) of a simulated robot, as the driver of a real one publishes it."""

from __future__ import annotations

from collections.abc import Collection
from xml.etree import ElementTree

import numpy as np
from scipy.spatial.transform import Rotation

from clp_ros.robots.embodiment import Joint
from clp_ros.simulation.model import load_mujoco
from clp_ros.simulation.robot import SimulatedRobot

_WORLD = "world"


def robot_description(robot: SimulatedRobot, sources: Collection[str]) -> str:
    """Returns a URDF document with the kinematics of the model and the limits of the embodiment.

    The document has no shapes, masses or efforts. Each body is a link below the link ``world``. A joint that moves with
    another one mimics it.

    Args:
        robot: The simulated robot.
        sources: Entries of the embodiment's ``joint_states``. The document contains every arm with a joint of these.
    """
    model, hinge = robot.mujoco_model, load_mujoco().mjtJoint.mjJNT_HINGE
    owners = [one.joint_states for one in robot.embodiment.controllers.values() for _ in one.joints]
    moved: dict[int, tuple[Joint, str, float]] = {}  # by MuJoCo joint: the joint that moves it, its name, its gain
    roots: set[int] = set()
    prefix = ""
    for owner, joint, modelled in zip(owners, robot.embodiment.joints, robot.modelled_joints, strict=True):
        prefix = joint.name.removesuffix(modelled.name)
        for name, gain in modelled.driven:
            index = model.joint(name).id
            moved[index] = joint, f"{prefix}{name.rpartition('/')[2]}", gain
            if owner in sources:
                roots.add(int(model.body_rootid[model.jnt_bodyid[index]]))
    links = [_WORLD, *(f"{prefix}{model.body(body).name}" for body in range(1, model.nbody))]
    document = ElementTree.Element("robot", name=robot.embodiment.name)
    ElementTree.SubElement(document, "link", name=_WORLD)
    for body in range(1, model.nbody):
        if int(model.body_rootid[body]) not in roots:
            continue
        ElementTree.SubElement(document, "link", name=links[body])
        at = int(model.body_jntadr[body])
        if at not in moved:
            element = ElementTree.SubElement(document, "joint", name=f"{links[body]}_joint", type="fixed")
        else:
            joint, name, gain = moved[at]
            kind = "revolute" if model.jnt_type[at] == hinge else "prismatic"
            element = ElementTree.SubElement(document, "joint", name=name, type=kind)
            ElementTree.SubElement(element, "axis", xyz=_text(model.jnt_axis[at]))
            low, high = sorted((gain * joint.lower, gain * joint.upper))
            limit = {"lower": low, "upper": high, "velocity": abs(gain) * joint.velocity, "effort": 0.0}
            ElementTree.SubElement(element, "limit", {key: f"{value:.9g}" for key, value in limit.items()})
            if name != joint.name:
                ElementTree.SubElement(element, "mimic", joint=joint.name, multiplier=f"{gain:.9g}")
        ElementTree.SubElement(element, "parent", link=links[int(model.body_parentid[body])])
        ElementTree.SubElement(element, "child", link=links[body])
        turn = Rotation.from_quat(model.body_quat[body], scalar_first=True).as_euler("xyz")
        ElementTree.SubElement(element, "origin", xyz=_text(model.body_pos[body]), rpy=_text(turn))
    ElementTree.indent(document)
    return ElementTree.tostring(document, encoding="unicode")


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.9g}" for value in values)
