# SPDX-License-Identifier: Apache-2.0
"""What a policy for an embodiment takes and gives."""

from clp_ros.policies.features import PolicyFeatures
from clp_ros.robots.embodiment import Embodiment


def embodiment_features(embodiment: Embodiment) -> PolicyFeatures:
    """The features of a policy made for this robot.

    Its statistics are those of positions spread over the middle of each joint's range, so that what an untrained policy
    gives is a position the robot has.
    """
    means, deviations = [], []
    for joint in embodiment.joints:
        lower, upper = (0.0, 1.0) if joint.unit == "normalised" else (joint.lower, joint.upper)
        means.append((lower + upper) / 2)
        deviations.append((upper - lower) / 10)
    return PolicyFeatures(
        cameras={camera.feature: (camera.height, camera.width) for camera in embodiment.cameras.values()},
        state_size=embodiment.action_size,
        action_size=embodiment.action_size,
        state_mean=tuple(means),
        state_std=tuple(deviations),
        action_mean=tuple(means),
        action_std=tuple(deviations),
    )
