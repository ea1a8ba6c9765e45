# SPDX-License-Identifier: Apache-2.0
"""Waits until every input of a robot is received, and explains which one is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.node import Node

from clp_ros.control.inputs import LiveInputs
from clp_ros.nodes.latched import LatchedStates
from clp_ros.nodes.listener import published_otherwise
from clp_ros.robots.embodiment import Embodiment

# Time between two checks of the inputs, in seconds.
_POLL_S = 0.05


class WaitEndedError(Exception):
    """The wait was ended, because the node was stopped or ROS has ended."""


def wait_for_inputs(
    node: Node,
    embodiment: Embodiment,
    inputs: LiveInputs,
    receive: Callable[[str, Any], None],
    timeout_s: float,
    ended: Callable[[], bool],
) -> str | None:
    """Waits until every input has a usable message.

    Args:
        node: The node.
        embodiment: The robot.
        inputs: The robot's messages.
        receive: Called with the topic and the message for messages that were latched before the node subscribed.
        timeout_s: Longest wait, in seconds.
        ended: Returns whether to end the wait.

    Returns:
        None if no input is missing; else the missing inputs and the reasons.

    Raises:
        WaitEndedError: ``ended`` returned True.
    """
    deadline = time.monotonic() + timeout_s
    latched = LatchedStates(node, embodiment, receive)
    try:
        while missing := inputs.missing(now_ns := node.get_clock().now().nanoseconds):
            if ended():
                raise WaitEndedError
            if time.monotonic() > deadline:
                if now_ns == 0:
                    return "no time on /clock, which use_sim_time needs: publish it (ros2 bag play --clock)"
                kinds = embodiment.topics
                advice = (published_otherwise(node, one.topic, kinds) or latched.advice(one) for one in missing)
                return "; ".join(map("{}{}".format, missing, advice))
            for one in missing:
                latched.take(one.topic)
            time.sleep(_POLL_S)
    finally:
        latched.close()
    return None
