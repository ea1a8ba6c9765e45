# SPDX-License-Identifier: Apache-2.0
"""Replays a recorded demonstration with current stamps, for machines without ``ros2 bag play``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock

from clp_ros.bags.reader import BagReader, open_bag
from clp_ros.core.errors import ClpError
from clp_ros.messages.stamps import header_stamp_ns
from clp_ros.nodes.messages import INPUT_TYPES, time_message


class Replay:
    """Publishes the camera and JointState messages of a bag, with the recorded times between them.

    Args:
        node: The node that publishes.
        reader: The recording.
        rate: Speed, 1 for real time.
        clock: Whether to keep the recorded stamps and publish the recording's time on /clock, for nodes with
            ``use_sim_time``. Otherwise, the messages are stamped with the present time.

    Raises:
        ClpError: The rate is not positive, or the bag has no camera and no JointState.
    """

    def __init__(self, node: Node, reader: BagReader, rate: float = 1.0, clock: bool = False) -> None:
        if not 0 < rate < float("inf"):
            raise ClpError(f"the rate is {rate}", where="rate", hint="give a finite rate above 0")
        topics = {
            topic.name: topic.type for topic in reader.topics.values() if topic.type in INPUT_TYPES and not topic.fault
        }
        if not topics:
            raise ClpError("the bag has no camera and no JointState", where=reader.path, hint="give a demonstration")
        self._node = node
        self._reader = reader
        self._rate = rate
        self._clock = node.create_publisher(Clock, "/clock", qos_profile_sensor_data) if clock else None
        self._publishers: dict[str, Publisher] = {
            name: node.create_publisher(INPUT_TYPES[kind], name, _quality(kind)) for name, kind in topics.items()
        }

    def play(self, stopped: threading.Event) -> int:
        """Replays the bag once, until ``stopped`` is set. Returns the number of published messages."""
        start = time.monotonic()
        now = self._node.get_clock().now().nanoseconds
        published = 0
        for message in self._reader.messages(list(self._publishers)):
            elapsed = (message.receive_ns - self._reader.start_ns) / self._rate
            if stopped.wait(max(0.0, start + elapsed / 1e9 - time.monotonic())):
                break
            copied = _as_ros(message.data, INPUT_TYPES[message.type])
            if self._clock is not None:
                self._clock.publish(Clock(clock=time_message(message.receive_ns)))
            else:
                # The recorded delay from the measurement to the reception is kept.
                late = message.receive_ns - header_stamp_ns(copied)
                copied.header.stamp = time_message(now + round(elapsed) - late)
            self._publishers[message.topic].publish(copied)
            published += 1
        return published


def _quality(kind: str) -> QoSProfile:
    return QoSProfile(depth=10) if kind.endswith("JointState") else qos_profile_sensor_data


def _as_ros(message: Any, kind: type) -> Any:
    """Returns rclpy's class of a message that was read with any of the bag libraries."""
    copied = kind()
    for name in kind.get_fields_and_field_types():
        value, default = getattr(message, name), getattr(copied, name)
        if hasattr(default, "get_fields_and_field_types"):
            value = _as_ros(value, type(default))
        elif isinstance(default, array):
            # rclpy copies an array, but checks every other sequence element by element.
            value = array(default.typecode, np.asarray(value, dtype=default.typecode).tobytes())
        setattr(copied, name, value)
    return copied


def main(args: Sequence[str] | None = None) -> int:
    """Replays a bag: ``python -m clp_ros.nodes.replay BAG [--rate R] [--clock] [--loop]``."""
    parser = argparse.ArgumentParser(description="Plays a recorded demonstration as if it were a robot now.")
    parser.add_argument("bag", type=Path, help="rosbag2 recording")
    parser.add_argument("--rate", type=float, default=1.0, help="speed (default: %(default)s)")
    parser.add_argument(
        "--clock", action="store_true", help="keep the stamps and publish /clock, as ros2 bag play does"
    )
    parser.add_argument("--loop", action="store_true", help="play again until stopped")
    # rclpy's own signal handlers would end ROS between two messages.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    options = parser.parse_args(rclpy.utilities.remove_ros_args(args)[1:] if args is None else args)
    node = rclpy.create_node("replay")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        replay = Replay(node, open_bag(options.bag), options.rate, options.clock)
        while replay.play(stopped) and options.loop and not stopped.is_set():
            pass
    except ClpError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
