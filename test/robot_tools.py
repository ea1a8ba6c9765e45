# SPDX-License-Identifier: Apache-2.0
"""A small robot for tests: one camera, an arm of two joints and a gripper."""

from types import SimpleNamespace
from typing import Any

import bag_tools
import numpy as np

from clp_ros.robots.embodiment import Embodiment

EYE, STATES = "/eye", "/states"
START = 1_700_000_000_000_000_000
MS = 10**6
JOINTS = ("waist", "elbow", "finger")


def sync(policy: str = "hold", tolerance_ms: float | None = None, stamp: str = "header") -> dict[str, Any]:
    return {"policy": policy, "stamp": stamp} | ({} if tolerance_ms is None else {"tolerance_ms": tolerance_ms})


def document(eye: dict[str, Any] | None = None, states: dict[str, Any] | None = None, rate: float = 50) -> dict:
    """The robot's YAML document; ``eye`` and ``states`` are the topics' sync."""

    def joint(name: str, lower: float, upper: float, unit: str) -> dict[str, Any]:
        return {"name": name, "lower": lower, "upper": upper, "velocity": 1.0, "unit": unit}

    return {
        "name": "small_arm",
        "description": "two joints, a gripper and a camera",
        "control_rate_hz": rate,
        "cameras": {
            "eye": {
                "topic": EYE,
                "type": "sensor_msgs/msg/Image",
                "feature": "observation.images.eye",
                "sync": eye or sync(),
            }
        },
        "joint_states": {"arm": {"topic": STATES, "sync": states or sync()}},
        "controllers": {
            "gripper": {
                "joint_states": "arm",
                "topic": "/gripper/joint_trajectory",
                "joints": [joint("finger", 0.02, 0.06, "normalised")],
            },
            "arm": {
                "joint_states": "arm",
                "topic": "/arm/joint_trajectory",
                "joints": [joint("waist", -1000, 1000, "rad"), joint("elbow", -1000, 1000, "rad")],
            },
        },
    }


def robot(eye: dict[str, Any] | None = None, states: dict[str, Any] | None = None, rate: float = 50) -> Embodiment:
    return Embodiment.model_validate(document(eye, states, rate))


def stamped(stamp_ns: int, **fields: Any) -> SimpleNamespace:
    stamp = SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp), **fields)


def states(stamp_ns: int, names: tuple[str, ...] = JOINTS, positions: Any = None) -> SimpleNamespace:
    """A JointState; by default waist 1, elbow 2, finger half open."""
    usual = {"waist": 1.0, "elbow": 2.0, "finger": 0.04}
    positions = [usual.get(name, 9.0) for name in names] if positions is None else positions
    return stamped(stamp_ns, name=list(names), position=np.array(positions, float))


def picture(stamp_ns: int, value: int = 0) -> Any:
    """A 2x2 Image, all bytes ``value``."""
    return bag_tools.image(np.full((2, 2, 3), value % 256, np.uint8), "rgb8", stamp_ns=stamp_ns)


def recorded_states(stamp_ns: int, waist: float = 1.0, elbow: float = 2.0, finger: float = 0.04) -> Any:
    """A JointState for a bag."""
    return bag_tools.joint_state(["elbow", "finger", "waist"], [elbow, finger, waist], stamp_ns)
