# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint with random weights of a family's real classes, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result, Seed
from clp_ros.policies.features import LIBERO, PolicyFeatures
from clp_ros.robots.embodiment import Embodiment


class MakeCheckpointRequest(Request):
    """Asks for a checkpoint with random weights.

    Attributes:
        family: Name of the family.
        size: ``tiny`` for tests, ``full`` for measurements, ``small`` (SmolVLA) to be trained on a CPU.
        output: Checkpoint folder to write.
        embodiment: The robot for the policy's cameras and joints: a name or a YAML file. None: LIBERO's features, as in
            the paper.
        seed: Seed of the weights.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    family: str
    size: Literal["tiny", "small", "full"]
    output: FilePath
    embodiment: str | FilePath | None = None
    seed: Seed = 0
    overwrite: bool = False


class MakeCheckpointResult(Result):
    """The new checkpoint.

    Attributes:
        output: Its folder, absolute.
        family: Its family.
        parameters: Number of parameters.
        bytes: Size of its weights.
    """

    output: Path
    family: str
    parameters: int
    bytes: int


def run(request: MakeCheckpointRequest, progress: Progress = SILENT) -> MakeCheckpointResult:
    """Makes the checkpoint.

    Raises:
        ClpError: The family or the robot is unknown, lerobot lacks the family, the output folder is not empty, or the
            disk is full.
    """
    from safetensors import SafetensorError

    from clp_ros.policies.checkpoint import Checkpoint
    from clp_ros.policies.family import check_lerobot
    from clp_ros.policies.quiet import quiet
    from clp_ros.policies.registry import family_named
    from clp_ros.robots.embodiment import load_embodiment

    family = family_named(request.family)
    check_lerobot(family)
    if request.size not in family.sizes:
        raise ClpError(
            f"there is no random {family.name} checkpoint of size {request.size}",
            where="--size",
            hint=f"choose one of {', '.join(family.sizes)}",
        )
    features = embodiment_features(load_embodiment(request.embodiment)) if request.embodiment else LIBERO
    final = request.output.absolute()
    progress.stage(f"making {final}")
    try:
        with atomic_folder(final, request.overwrite) as folder, quiet():
            family.make_checkpoint(request.size, folder, final, features, request.seed)
    except SafetensorError as error:  # safetensors raises it for a full disk
        raise ClpError(
            f"the checkpoint cannot be written ({error})",
            where=final,
            hint="free some disk space, or give another --output",
        ) from error
    made = Checkpoint.open(final)
    return MakeCheckpointResult(output=final, family=family.name, parameters=made.parameters(), bytes=made.nbytes)


def embodiment_features(embodiment: Embodiment) -> PolicyFeatures:
    """Returns the features of a policy for this robot.

    The statistics are those of positions in the middle of each joint's range, so that an untrained policy predicts
    positions within the limits.
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
