# SPDX-License-Identifier: Apache-2.0
"""Reads joint limits from a robot's URDF, and narrows an embodiment's limits to them, without ROS.

The robot's state publisher and controllers read the same document with urdfdom, which accepts more than the XML
standards. Therefore only the necessary parts are read here, and only driven joints are checked. The Python libraries
for URDF are not used. urdf_parser_py refuses a joint limit without an effort or a velocity. yourdfpy needs trimesh.
Both refuse an unbound prefix and a blank line before the declaration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.robots.embodiment import Controller, Embodiment, Joint

# Limits this close are equal and not reported: numbers in descriptions are often rounded, such as 3.14159 for pi.
_SAME = 1e-4
_MOVING = ("revolute", "continuous", "prismatic")  # types with one position
_COMMENT = re.compile("<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class JointLimits:
    """A joint in a URDF.

    Attributes:
        kind: Its type: revolute, continuous, prismatic, fixed, ….
        lower, upper: Position limits, rad or m, narrowed by its safety controller; infinite if there are none.
        velocity: Velocity limit, per second; infinite if there is none.
        mimics: The joint that it mimics; None: it moves by itself.
        fault: Why its limits cannot be read; None if they can.
    """

    kind: str
    lower: float = -math.inf
    upper: float = math.inf
    velocity: float = math.inf
    mimics: str | None = None
    fault: str | None = None


def read_limits(urdf: str, where: object) -> dict[str, JointLimits]:
    """Reads the limits of all joints.

    Args:
        urdf: The published document.
        where: Its topic or file, for errors.

    Raises:
        ClpError: The document is not URDF, or declares a document type (entities could use unbounded memory). Faults of
            single joints are in :attr:`JointLimits.fault`, because the joint may not be needed.
    """
    root = _parsed(urdf, where)
    if root.tag != "robot":
        raise ClpError(f"the robot description is a <{root.tag}>, not a <robot>", where=where, hint="publish URDF")
    limits: dict[str, JointLimits] = {}
    # Direct children only: transmissions and ros2_control have other <joint> elements further down.
    for element in root.findall("joint"):
        name = element.get("name", "")
        its = _limits(element)
        if name in limits and its != limits[name]:
            its = replace(its, fault="it is there twice, and not the same")
        limits[name] = its
    return limits


def _parsed(urdf: str, where: object) -> ElementTree.Element:
    """Returns the document's root.

    ElementTree's default parser refuses prefixes without a namespace, which xacro and Gazebo leave in documents.
    """

    def refuse(*_: object) -> None:
        raise ClpError("the robot description declares a DOCTYPE", where=where, hint="publish plain URDF")

    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    try:
        # expat refuses anything before the declaration, and "--" in a comment; urdfdom accepts both.
        parser.Parse(_COMMENT.sub("", urdf.rstrip("\0")).lstrip("\ufeff \t\r\n"), True)
        return builder.close()
    except ClpError:  # ClpError is a ValueError
        raise
    except (expat.ExpatError, ValueError, AssertionError) as error:
        raise ClpError(f"the robot description is not XML ({error})", where=where, hint="publish URDF") from error


def _limits(element: ElementTree.Element) -> JointLimits:
    kind, mimic = element.get("type", ""), element.find("mimic")
    its = JointLimits(kind, mimics=None if mimic is None else mimic.get("joint", ""))
    try:
        return replace(its, **_bounds(element, kind))
    except ValueError as error:
        return replace(its, fault=str(error))


def _bounds(element: ElementTree.Element, kind: str) -> dict[str, Any]:
    limit = element.find("limit")
    velocity = _number(limit, "velocity", math.inf)
    if velocity <= 0:
        raise ValueError(f"its velocity limit is {velocity:g}")
    # A continuous joint has no position limits, even if given. By the format, an omitted limit is 0.
    bounded = kind in ("revolute", "prismatic") and limit is not None
    lower = _number(limit, "lower", 0.0) if bounded else -math.inf
    upper = _number(limit, "upper", 0.0) if bounded else math.inf
    # By the format, omitted soft limits are 0, so two zeros mean that there are none. A single omitted one is no limit.
    soft = element.find("safety_controller") if kind != "continuous" else None
    soft_lower, soft_upper = _number(soft, "soft_lower_limit", -math.inf), _number(soft, "soft_upper_limit", math.inf)
    if soft_lower != 0 or soft_upper != 0:
        lower, upper = max(lower, soft_lower), min(upper, soft_upper)
    return {"lower": lower, "upper": upper, "velocity": velocity}


def _number(element: ElementTree.Element | None, name: str, default: float) -> float:
    text = None if element is None else element.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"its {name} is {text!r}, which is no number")
    return value


def narrow(
    embodiment: Embodiment, descriptions: Mapping[str, str], where: Mapping[str, object]
) -> tuple[Embodiment, list[str]]:
    """Narrows an embodiment's limits to those of its robot's description. No limit becomes wider.

    The positions for a normalised joint's 0 and 1 do not change.

    Args:
        embodiment: The robot with the limits of its YAML file.
        descriptions: URDF documents, by the entry of ``joint_states`` whose joints they describe. The limits of other
            entries stay.
        where: The topic or file of each document, for errors.

    Returns:
        The embodiment, and a line for every joint with narrower limits.

    Raises:
        ClpError: A document cannot be read or lacks a joint, a joint's limits cannot be read, a joint is fixed or
            mimics another one, or the limits do not overlap. Joints that the embodiment does not drive are not checked.
    """
    limits = {source: read_limits(urdf, where[source]) for source, urdf in descriptions.items()}
    controllers: dict[str, Controller] = {}
    lines: list[str] = []
    for name, controller in embodiment.controllers.items():
        joints = list(controller.joints)
        if (source := controller.joint_states) in limits:
            joints = [_narrowed(joint, embodiment.name, limits[source], where[source]) for joint in joints]
            for before, after in zip(controller.joints, joints, strict=True):
                lines += _difference(name, before, after)
        controllers[name] = controller.model_copy(update={"joints": joints})
    # `joints` is a cached property, and a copy would keep the old values.
    return Embodiment.model_validate(embodiment.model_copy(update={"controllers": controllers}).model_dump()), lines


def _narrowed(joint: Joint, robot: str, limits: Mapping[str, JointLimits], where: object) -> Joint:
    if (its := limits.get(joint.name)) is None:
        raise ClpError(
            f"{robot} has a joint {joint.name!r}, but its robot description has none of this name",
            where=where,
            hint=f"{did_you_mean(joint.name, [name for name, its in limits.items() if its.kind != 'fixed'])} "
            "(see tf_prefix); or set robot_description_wait to 0 to use the embodiment's limits alone",
        )
    if its.mimics is not None or its.kind == "fixed":
        how = "is fixed" if its.mimics is None else f"follows {its.mimics!r}"
        raise ClpError(
            f"{robot} drives the joint {joint.name!r}, which {how} in its robot description",
            where=where,
            hint="name the joint that moves in the embodiment",
        )
    if its.kind not in _MOVING:
        raise ClpError(
            f"{robot} drives the joint {joint.name!r}, whose type is {its.kind!r} in its robot description",
            where=where,
            hint=f"name a joint of type {', '.join(_MOVING)} in the embodiment, or correct the URDF",
        )
    if its.fault is not None:
        raise ClpError(
            f"joint {joint.name!r} of the robot description: {its.fault}",
            where=where,
            hint="correct the URDF, or set robot_description_wait to 0 to use the embodiment's limits alone",
        )
    lower, upper = max(joint.lower, its.lower), min(joint.upper, its.upper)
    if lower >= upper:
        raise ClpError(
            f"the limits of joint {joint.name!r} do not overlap: {joint.lower:g} … {joint.upper:g} in {robot}, "
            f"{its.lower:g} … {its.upper:g} in its robot description",
            where=where,
            hint="correct the limits in the embodiment, or the tf_prefix",
        )
    update = {"lower": lower, "upper": upper, "velocity": min(joint.velocity, its.velocity)}
    if joint.unit == "normalised":
        update |= {
            "zero": joint.lower if joint.zero is None else joint.zero,
            "one": joint.upper if joint.one is None else joint.one,
        }
    return joint.model_copy(update=update)


def _difference(controller: str, before: Joint, after: Joint) -> list[str]:
    changed = [
        f"{key} {getattr(before, key):g} -> {getattr(after, key):g}"
        for key in ("lower", "upper", "velocity")
        if abs(getattr(before, key) - getattr(after, key)) > _SAME
    ]
    return [f"{controller}, {before.name}: {', '.join(changed)}"] if changed else []
