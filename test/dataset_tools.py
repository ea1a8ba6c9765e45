# SPDX-License-Identifier: Apache-2.0
"""A small LeRobotDataset, and the features of the policies that are trained on it."""

import itertools
from pathlib import Path

import numpy as np

from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.quiet import quiet

CAMERA = "observation.image"
TASK = "Push the T-shaped block onto the target."
SIDE = 96
# gym-pusht's: a camera, and the position of the pusher on a board of 512 by 512.
PUSHT = PolicyFeatures(
    cameras={CAMERA: (SIDE, SIDE)},
    state_size=2,
    action_size=2,
    state_mean=(256.0,) * 2,
    state_std=(100.0,) * 2,
    action_mean=(256.0,) * 2,
    action_std=(100.0,) * 2,
)


def write_dots(root: Path, frames: int, episodes: int = 2) -> Path:
    """Writes episodes of a dot on its way round, with where it is next as the action."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        CAMERA: {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    with quiet():
        written = LeRobotDataset.create("clp_ros/dots", fps=10, features=features, root=root, use_videos=False)
        for start in range(episodes):
            angles = 2.0 * start + np.linspace(0.0, frames / 10, frames + 1)
            places = (256 + 150 * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)
            for place, following in itertools.pairwise(places):
                picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
                row, column = (place[::-1] * SIDE / 512).astype(int)
                picture[row - 4 : row + 4, column - 4 : column + 4] = 255
                written.add_frame({CAMERA: picture, "observation.state": place, "action": following, "task": TASK})
            written.save_episode()
        written.finalize()
    return root
