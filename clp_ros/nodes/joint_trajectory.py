# SPDX-License-Identifier: Apache-2.0
"""Serializes a trajectory as a trajectory_msgs/JointTrajectory. This uses no node, topic or clock."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np
from builtin_interfaces.msg import Time

from clp_ros.nodes.messages import NANOSECONDS
from clp_ros.robots.trajectory import Trajectory

# Header of CDR (OMG's Common Data Representation), little-endian. The values after it are aligned to their size.
_ENCODING = b"\x00\x01\x00\x00"


def serialized_joint_trajectory(trajectory: Trajectory, stamp: Time, frame_id: str = "") -> bytes:
    """Serializes a trajectory for a joint_trajectory_controller.

    Every rmw implementation publishes serialized messages. This is done for speed: message objects, which rclpy
    converts attribute by attribute, would take half of the time from the policy to the controllers.

    Args:
        trajectory: The trajectory. Its velocities are optional.
        stamp: Start time. A zero stamp means "now" to the controller.
        frame_id: The header's frame_id.

    Returns:
        The message in CDR.

    Raises:
        ValueError: The trajectory is invalid, and a controller would drop it or follow it wrongly: it has no points or
            wrong shapes, is not finite, ends with a velocity, or has times that are not positive and strictly
            increasing in whole nanoseconds.
    """
    positions = np.asarray(trajectory.positions, dtype=np.float64)
    times = np.asarray(trajectory.times, dtype=np.float64)
    shape = (len(times), len(trajectory.joint_names))
    if times.ndim != 1 or positions.shape != shape or 0 in shape:
        raise ValueError(f"a trajectory of shape {positions.shape}, where times and joints say {shape}")
    velocities = positions[:, :0] if trajectory.velocities is None else np.asarray(trajectory.velocities, dtype=float)
    if trajectory.velocities is not None and velocities.shape != shape:
        raise ValueError(f"velocities of shape {velocities.shape}, where times and joints say {shape}")
    if not all(np.isfinite(values).all() for values in (positions, velocities, times)):
        raise ValueError("a trajectory that is not finite")
    nanoseconds = np.rint(times * NANOSECONDS).astype(np.int64)
    if nanoseconds[0] <= 0 or (nanoseconds[1:] <= nanoseconds[:-1]).any():
        raise ValueError("a trajectory whose times are not positive and strictly increasing")
    if velocities[-1].any():
        raise ValueError("a trajectory that does not end at rest")
    front = struct.pack("<iI", stamp.sec, stamp.nanosec) + _string(frame_id)
    front += _strings(trajectory.joint_names) + struct.pack("<I", len(times))
    parts, start = [_ENCODING, front], len(front)
    # All points after the first have the same alignment.
    for part in (slice(0, 1), slice(1, None)):
        layout = _point(start % 8, shape[1], velocities.shape[1])
        points = np.zeros(len(times[part]), layout)
        points["joints"], points["positions"] = positions.shape[1], positions[part]
        points["moving"], points["velocities"] = velocities.shape[1], velocities[part]
        points["sec"], points["nanosec"] = np.divmod(nanoseconds[part], NANOSECONDS)
        parts.append(points.tobytes())
        start += layout.itemsize
    return b"".join(parts)


def _string(text: str) -> bytes:
    """Returns a string with the padding that aligns a four-byte number after it."""
    coded = text.encode() + b"\0"
    return struct.pack("<I", len(coded)) + coded + bytes(-len(coded) % 4)


@cache
def _strings(texts: tuple[str, ...]) -> bytes:
    """Returns a sequence of strings."""
    return struct.pack("<I", len(texts)) + b"".join(_string(text) for text in texts)


@cache
def _point(start: int, joints: int, moving: int) -> np.dtype:
    """Returns the layout of a JointTrajectoryPoint without accelerations and effort.

    Args:
        start: Offset of the point from an eight-byte boundary.
        joints: Number of positions.
        moving: Number of velocities.
    """
    at, layout = start, {"names": [], "formats": [], "offsets": []}
    for name, kind, count in (
        ("joints", "<u4", 1),
        ("positions", "<f8", joints),
        ("moving", "<u4", 1),
        ("velocities", "<f8", moving),
        ("accelerations", "<u4", 1),
        ("effort", "<u4", 1),
        ("sec", "<i4", 1),
        ("nanosec", "<u4", 1),
    ):
        size = np.dtype(kind).itemsize
        if count:
            at += -at % size
        layout["names"].append(name)
        layout["formats"].append((kind, (count,)) if kind == "<f8" else kind)
        layout["offsets"].append(at - start)
        at += size * count
    return np.dtype(layout | {"itemsize": at - start})
