# SPDX-License-Identifier: Apache-2.0
"""Reads the parameters of the robot's joint_trajectory_controllers, and checks that they accept our messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from rcl_interfaces.srv import GetParameters
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.parameter import parameter_value_to_python

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Controller, Embodiment

_SUFFIX = "/joint_trajectory"
_POLL_S = 0.02
_FROM_DESIRED = "interpolate_from_desired_state"
_NAMES = (
    _FROM_DESIRED,
    "open_loop_control",
    "allow_nonzero_velocity_at_trajectory_end",
    "allow_partial_joints_goal",
    "interpolation_method",
    "joints",
)
_ADVICE = (
    "{owner}: interpolate_from_desired_state is false, so a trajectory may begin with a step of the joints' lag; "
    "in the controllers' YAML, add `interpolate_from_desired_state: true` to the ros__parameters of {owner} "
    "(it cannot be set while the controller runs)"
)


@dataclass(frozen=True)
class ControllerFacts:
    """Parameters of a controller's node. Each is None if the node does not have it.

    Attributes:
        from_desired: Whether a new trajectory begins at the last command. Otherwise, it begins at the measured state.
        moving_end: Whether a trajectory may end with a velocity. Those of clp_ros never do.
        partial: Whether a message may contain only some of the joints.
        interpolation: Interpolation between points, ``splines`` or ``none``.
        joints: Names of the joints.
    """

    from_desired: bool | None = None
    moving_end: bool | None = None
    partial: bool | None = None
    interpolation: str | None = None
    joints: tuple[str, ...] | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Returns the facts from parameter values by name."""

        def typed(name: str, kind: type) -> Any:
            # A node of another kind may have a parameter of the same name and another type.
            value = values.get(name)
            return value if isinstance(value, kind) else None

        desired = typed(_FROM_DESIRED, bool)
        if typed("open_loop_control", bool):  # the deprecated name of the same parameter
            desired = True
        joints = typed("joints", list)
        return cls(
            desired,
            typed("allow_nonzero_velocity_at_trajectory_end", bool),
            typed("allow_partial_joints_goal", bool),
            typed("interpolation_method", str),
            None if joints is None or not all(isinstance(one, str) for one in joints) else tuple(joints),
        )


def node_name(topic: str) -> str | None:
    """Returns the name of a controller's node, such as ``/left/arm_controller``.

    Args:
        topic: The controller's topic.

    Returns:
        The name; None if the topic does not contain one.
    """
    name = topic.removesuffix(_SUFFIX)
    return name if name != topic and name else None


def check(controller: Controller, facts: ControllerFacts) -> None:
    """Checks that a controller accepts messages for the embodiment's joints. The order of the joints may differ.

    Args:
        controller: The embodiment's entry.
        facts: The controller's parameters.

    Raises:
        ClpError: The controller would drop every message for its joints, or would jump from point to point.
    """
    if facts.interpolation == "none":
        raise ClpError(
            "interpolation_method is none: the controller jumps from point to point",
            where=node_name(controller.topic),
            hint="set interpolation_method: splines in the controllers' YAML",
        )
    if facts.joints is None:
        return
    ours, theirs = {joint.name for joint in controller.joints}, set(facts.joints)
    unknown, left_out = sorted(ours - theirs), sorted(theirs - ours)
    if unknown:
        what = f"the controller has no joint {unknown[0]!r}; its joints are {', '.join(facts.joints)}"
    elif left_out and not facts.partial:
        what = f"the controller also has {', '.join(left_out)}, and allow_partial_joints_goal is false"
    else:
        return
    raise ClpError(
        what,
        where=node_name(controller.topic),
        hint="name its joints in the embodiment, or give tf_prefix, or another topic of the controller in topics",
    )


class ControllerNodes:
    """Clients of the controllers' parameter services. Create them early, because discovery takes time.

    The node's executor must spin in another thread while :meth:`check` waits. The node's parameter ``controller_wait``
    bounds the search for the controllers' nodes, in seconds from the construction of this object, and then the wait for
    their answers. With 0, no controller is checked.

    Args:
        node: The node, which has the parameter.
        embodiment: The robot.

    Raises:
        ClpError: The parameter is negative or not finite.
    """

    def __init__(self, node: Node, embodiment: Embodiment) -> None:
        self._node = node
        self._embodiment = embodiment
        self._advised: set[str] = set()
        self._wait_s = node.get_parameter("controller_wait").value
        if not 0 <= self._wait_s < float("inf"):
            raise ClpError(
                f"the parameter controller_wait is {self._wait_s}", where=node.get_name(), hint="give 0 or seconds"
            )
        self._looked_s = time.monotonic() + self._wait_s
        group = ReentrantCallbackGroup()
        self._clients = {
            name: node.create_client(GetParameters, f"{owner}/get_parameters", callback_group=group)
            for name, controller in embodiment.controllers.items()
            if self._wait_s and (owner := node_name(controller.topic)) is not None
        }

    def close(self) -> None:
        """Destroys the clients."""
        for client in self._clients.values():
            self._node.destroy_client(client)
        self._clients = {}

    def check(self, is_over: Callable[[], bool]) -> dict[str, ControllerFacts]:
        """Reads the parameters of all controllers, checks the joints, and logs each advice once.

        Args:
            is_over: Returns whether to end the wait early.

        Returns:
            The facts of the controllers that have answered, by the controller's name in the embodiment.

        Raises:
            ClpError: A controller would drop every message, or would not interpolate.
        """
        facts = self._ask(is_over)
        logger = self._node.get_logger()
        for name, controller in self._embodiment.controllers.items():
            owner = node_name(controller.topic) or controller.topic
            advice = None
            if name in facts:
                check(controller, facts[name])
                if facts[name].from_desired is False:
                    advice = _ADVICE.format(owner=owner)
            elif self._wait_s:
                advice = f"{owner} does not answer: neither its joints nor {_FROM_DESIRED} are checked"
            if advice is not None and advice not in self._advised and not is_over():
                self._advised.add(advice)
                # Two calls, because rclpy refuses a call whose severity changes.
                if name in facts:
                    logger.warning(advice)
                else:
                    logger.info(advice)
        return facts

    def _ask(self, is_over: Callable[[], bool]) -> dict[str, ControllerFacts]:
        # One request per parameter: an unknown name would make an answer without any value.
        calls: dict[str, dict[str, Any]] = {}
        answered_s = time.monotonic() + self._wait_s
        while not is_over():
            for name, client in self._clients.items():
                if name not in calls and client.service_is_ready():
                    calls[name] = {one: client.call_async(GetParameters.Request(names=[one])) for one in _NAMES}
            now_s = time.monotonic()
            is_looked_for = len(calls) < len(self._clients) and now_s < self._looked_s
            is_pending = now_s < answered_s and not all(
                future.done() for futures in calls.values() for future in futures.values()
            )
            if not (is_looked_for or is_pending):
                break
            time.sleep(_POLL_S)
        facts = {}
        for name, futures in calls.items():
            values = {one: _value(future) for one, future in futures.items() if future.done()}
            for future in futures.values():
                if not future.done():
                    self._clients[name].remove_pending_request(future)
            if values:
                facts[name] = ControllerFacts.of(values)
        return facts


def _value(future: Any) -> Any:
    """Returns the value in an answer; None if the node does not have the parameter."""
    if future.exception() is not None:
        return None
    values = future.result().values
    return parameter_value_to_python(values[0]) if values else None
