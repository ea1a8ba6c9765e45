# SPDX-License-Identifier: Apache-2.0
"""Joint limits out of a robot's URDF, and an embodiment narrowed to them. Nothing here knows ROS.

The document is the one that the robot runs with. Its state publisher and its controllers have read it by urdfdom, which
accepts more than XML's standards do. So only what is needed is read here, and only driven joints are judged.
The URDF libraries for Python serve less well. urdf_parser_py refuses a joint limit without an effort or a velocity.
yourdfpy needs trimesh. Both parse strictly: an unbound prefix and a blank line before the declaration are errors.
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

# A description's numbers are often rounded, 3.14159 for pi: what is this close is the same limit, and no news.
_SAME = 1e-4
_MOVING = ("revolute", "continuous", "prismatic")  # one position each
_COMMENT = re.compile("<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class JointLimits:
    """What a URDF says of a joint.

    Attributes:
        kind: Its type: revolute, continuous, prismatic, fixed, ….
        lower, upper: Position limits, rad or m, narrowed by its safety controller; infinite where there is none.
        velocity: Velocity limit, per second; infinite where there is none.
        mimics: The joint it follows; None where it moves by itself.
        fault: What is wrong with it, so that its limits cannot be told; None where nothing is.
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
        urdf: The document, as a robot publishes it.
        where: What to call it in errors: its topic or file.

    Raises:
        ClpError: It is no URDF, or declares a document type (entities could make it explode). What is wrong with a
            single joint is in its :attr:`JointLimits.fault`: nobody may want to know.
    """
    root = _parsed(urdf, where)
    if root.tag != "robot":
        raise ClpError(f"the robot description is a <{root.tag}>, not a <robot>", where=where, fix="publish URDF")
    limits: dict[str, JointLimits] = {}
    # Direct children only: transmissions and ros2_control have <joint> elements of their own further down.
    for element in root.findall("joint"):
        name = element.get("name", "")
        its = _limits(element)
        if name in limits and its != limits[name]:
            its = replace(its, fault="it is there twice, and not the same")
        limits[name] = its
    return limits


def _parsed(urdf: str, where: object) -> ElementTree.Element:
    """The document's root.

    ElementTree's own parser resolves namespaces. It refuses prefixes without one, as xacro and Gazebo leave behind.
    """

    def refuse(*_: object) -> None:
        raise ClpError("the robot description declares a DOCTYPE", where=where, fix="publish plain URDF")

    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    try:
        # For expat, nothing may come before the declaration, and no comment may have "--"; urdfdom is not that strict.
        parser.Parse(_COMMENT.sub("", urdf.lstrip("\ufeff \t\r\n").rstrip("\0")), True)
        return builder.close()
    except ClpError:  # a ValueError too
        raise
    except (expat.ExpatError, ValueError, AssertionError) as error:
        raise ClpError(f"the robot description is not XML ({error})", where=where, fix="publish URDF") from error


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
    # A continuous joint has no position limits, whatever stands there; where one is left out it is 0 by the format.
    bounded = kind in ("revolute", "prismatic") and limit is not None
    lower = _number(limit, "lower", 0.0) if bounded else -math.inf
    upper = _number(limit, "upper", 0.0) if bounded else math.inf
    # The format has 0 for soft limits left out as well, but then the two of them say nothing.
    soft = element.find("safety_controller") if kind != "continuous" else None
    lower = max(lower, _number(soft, "soft_lower_limit", -math.inf))
    upper = min(upper, _number(soft, "soft_upper_limit", math.inf))
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
    """Narrows an embodiment's limits to those of its robot's description; none gets wider.

    What a normalised joint's 0 and 1 stand for stays as it is.

    Args:
        embodiment: The robot, as its YAML has it.
        descriptions: URDF documents, by the entry of ``joint_states`` whose joints they describe. The limits of
            entries that have none stay.
        where: What to call each document in errors.

    Returns:
        The embodiment, and a line for every joint whose limits became narrower.

    Raises:
        ClpError: A document cannot be read; lacks a joint; the limits of a joint cannot be told; a joint is fixed or
            follows another one; or the two limits leave it no room. It names both sides. Joints that the embodiment
            does not drive may be anything.
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
    # joints is a cached property, and a copy would keep the old ones.
    return Embodiment.model_validate(embodiment.model_copy(update={"controllers": controllers}).model_dump()), lines


def _narrowed(joint: Joint, robot: str, limits: Mapping[str, JointLimits], where: object) -> Joint:
    if (its := limits.get(joint.name)) is None:
        raise ClpError(
            f"{robot} has a joint {joint.name!r}, its robot description has none of that name",
            where=where,
            fix=f"{did_you_mean(joint.name, [name for name, its in limits.items() if its.kind != 'fixed'])} "
            "(see tf_prefix); or set robot_description_wait to 0 to go by the embodiment's limits alone",
        )
    if its.mimics is not None or its.kind == "fixed":
        how = "is fixed" if its.mimics is None else f"follows {its.mimics!r}"
        raise ClpError(
            f"{robot} drives the joint {joint.name!r}, which {how} in its robot description",
            where=where,
            fix="name the joint that moves in the embodiment",
        )
    if its.kind not in _MOVING:
        raise ClpError(
            f"{robot} drives the joint {joint.name!r}, whose type is {its.kind!r} in its robot description",
            where=where,
            fix=f"name a joint of type {', '.join(_MOVING)} in the embodiment, or correct the URDF",
        )
    if its.fault is not None:
        raise ClpError(
            f"joint {joint.name!r} of the robot description: {its.fault}",
            where=where,
            fix="correct the URDF, or set robot_description_wait to 0 to go by the embodiment's limits alone",
        )
    lower, upper = max(joint.lower, its.lower), min(joint.upper, its.upper)
    if lower >= upper:
        raise ClpError(
            f"joint {joint.name!r} has no room: {joint.lower:g} … {joint.upper:g} in {robot}, "
            f"{its.lower:g} … {its.upper:g} in its robot description",
            where=where,
            fix="correct the limits in the embodiment, or its tf_prefix",
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
