# SPDX-License-Identifier: Apache-2.0
"""The inputs and outputs of a lerobot policy: cameras, sizes and statistics."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from clp_ros.checkpoints.folder import CONFIG_FILE
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Policy
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import Family
from clp_ros.policies.normalisation import Normalisation, normalise_by, read_normalisation
from clp_ros.policies.processors import rename_map
from clp_ros.policies.statistics import ACTION, STATE, Statistics

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy


@dataclass
class LeRobotFeatures(Policy):
    """The part of a lerobot policy that describes its inputs, outputs and normalisation.

    Attributes:
        checkpoint: The checkpoint.
        policy: lerobot's policy, in evaluation mode.
        preprocessor: lerobot's pipeline from observations and actions to batches.
        postprocessor: lerobot's pipeline from the model's actions to the robot's.
        device: Its device, e.g. ``cpu`` or ``cuda``.
        statistics: The statistics given to :meth:`normalise_by`; None: the checkpoint's.
    """

    checkpoint: Checkpoint
    policy: PreTrainedPolicy
    preprocessor: Any
    postprocessor: Any
    device: str
    statistics: Statistics | None = field(default=None, init=False)
    _given_cameras: tuple[str, ...] = field(default=(), init=False)

    @property
    def family(self) -> Family:
        """The checkpoint's family."""
        return self.checkpoint.family

    @property
    @override
    def family_name(self) -> str:
        return self.family.name

    @property
    @override
    def path(self) -> Path:
        return self.checkpoint.path

    @override
    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    @cached_property
    def normalisation(self) -> Normalisation:
        """How its processors normalise."""
        return read_normalisation(
            self.preprocessor, self.postprocessor, self.policy.config, rename_map(self.checkpoint)
        )

    @property
    @override
    def camera_sizes(self) -> Mapping[str, tuple[int, int]]:
        features = self.policy.config.image_features
        return {name: tuple(features[name].shape[1:]) for name in self.image_features}

    @property
    def image_features(self) -> tuple[str, ...]:
        """All camera features of its config, in the config's order, without lerobot's empty cameras."""
        return tuple(name for name in self.policy.config.image_features if ".empty_camera_" not in name)

    @property
    def image_slots(self) -> tuple[str, ...]:
        """Old name of :attr:`image_features`."""
        warnings.warn("LeRobotPolicy.image_slots is now image_features", DeprecationWarning, stacklevel=2)
        return self.image_features

    @property
    @override
    def cameras(self) -> tuple[str, ...]:
        """The camera features that it needs, in the config's order.

        After :meth:`check_features`, those of the robot. Before, those with statistics, with which it was trained; if
        there are none, all.
        """
        trained = self._trained_cameras
        return self._given_cameras or tuple(name for name in self.image_features if not trained or name in trained)

    @property
    @override
    def left_out_cameras(self) -> tuple[str, ...]:
        """Camera features of its config that are left out; lerobot's model runs without them."""
        return tuple(name for name in self.image_features if name not in self.cameras)

    @property
    @override
    def state_size(self) -> int:
        """Length of ``observation.state``, from its statistics, because fine-tuning keeps the base model's config
        entry."""
        return self.normalisation.sizes.get(STATE) or feature_size(self.policy.config, STATE, self.checkpoint.path)

    @property
    @override
    def action_size(self) -> int:
        """Length of one action, from its statistics, otherwise from ``output_features``."""
        return self.normalisation.sizes.get(ACTION) or feature_size(self.policy.config, ACTION, self.checkpoint.path)

    @property
    @override
    def chunk_size(self) -> int:
        return len(self.policy.config.action_delta_indices)  # as trained: a GR00T may have fewer than its chunk_size

    @property
    def _trained_cameras(self) -> frozenset[str]:
        """The cameras of its training data; empty if unknown, or if the model needs all cameras."""
        if not self.family.skips_absent_cameras:
            return frozenset()
        return self.normalisation.cameras & frozenset(self.image_features)

    @override
    def check_features(self, cameras: Collection[str], action_size: int, whose: str) -> list[str]:
        """As :meth:`Policy.check_features`. Afterwards, the policy expects the robot's cameras.

        A camera of the policy that the robot lacks is left out as in lerobot, if the family's model can run without it
        and the robot has at least one of the others. The notes name these cameras, and those that the policy was not
        trained with.
        """
        notes = self.check_cameras(cameras, whose)
        # Without statistics, the size of the state is the base model's, which lerobot pads and never checks.
        padded = STATE not in self.normalisation.sizes and action_size <= getattr(
            self.policy.config, "max_state_dim", 0
        )
        if self.action_size != action_size or (self.state_size != action_size and not padded):
            raise ClpError(
                f"the policy's state has {self.state_size} and its action {self.action_size} components; "
                f"{whose} has {action_size} joints",
                where=self.checkpoint.path,
                hint="use a checkpoint that was trained for this embodiment"
                if not self.normalisation.missing
                else "fine-tune it for this robot, or give --statistics to calibrate it as it is",
            )
        return notes

    @override
    def check_cameras(self, cameras: Collection[str], whose: str) -> list[str]:
        absent, unknown = set(self.image_features) - set(cameras), set(cameras) - set(self.image_features)
        if unknown or not cameras or (absent and not self.family.skips_absent_cameras):
            raise ClpError(
                f"the policy's cameras are {', '.join(sorted(self.image_features)) or 'none'}; "
                f"{whose} has {', '.join(sorted(cameras)) or 'none'}",
                where=self.checkpoint.path,
                hint="write the policy's feature of each camera into the embodiment",
            )
        self._given_cameras = tuple(name for name in self.image_features if name in cameras)
        trained, notes = self._trained_cameras, []
        for name in self.left_out_cameras:
            known = ", though the policy was trained with it" if name in trained else ""
            notes.append(f"the camera {name} is left out: {whose} does not have it{known}")
        notes += [
            f"the policy was not trained with the camera {name}: its statistics do not name it"
            for name in self.cameras
            if trained and name not in trained
        ]
        return notes

    @property
    @override
    def raw_features(self) -> tuple[str, ...]:
        return self.normalisation.missing

    @override
    def normalise_by(self, statistics: Statistics) -> None:
        """Normalises state and actions by other statistics than the checkpoint's, which may have none.

        Raises:
            ClpError: The statistics lack what the policy needs or do not fit its size, or its processors use none.
        """
        config, where = self.policy.config, self.checkpoint.path
        for feature, width in ((STATE, "max_state_dim"), (ACTION, "max_action_dim")):
            most = getattr(config, width, None)
            size = statistics.size(feature)
            if most is not None and size > most:
                raise ClpError(
                    f"the statistics of {feature} have {size} components, the policy takes at most {most}",
                    where=where,
                    hint="use the statistics of this robot's data, or another checkpoint",
                )
        if not normalise_by(self.preprocessor, self.postprocessor, config, statistics):
            raise ClpError(
                f"the processors of {self.family.name} take no statistics",
                where=where,
                hint="calibrate it without --statistics",
            )
        self.statistics = statistics
        vars(self).pop("normalisation", None)  # to read it again
        self.check_complete()

    @override
    def describe_statistics(self) -> dict[str, Any]:
        """Returns the origin of its statistics, for JSON: ``source`` (``checkpoint``, ``dataset``, ``bags`` or
        ``none``).

        ``raw`` lists features that lerobot does not normalise, because statistics are missing; ``values`` has given
        statistics.
        """
        if self.statistics is not None:
            return self.statistics.describe()
        raw = list(self.normalisation.missing)
        return {"source": "none", "raw": raw} if raw else {"source": "checkpoint"}

    @override
    def check_normalised(self) -> None:
        self.check_complete()
        super().check_normalised()

    def check_complete(self) -> None:
        """Refuses incomplete statistics, with which lerobot would fail.

        Raises:
            ClpError: Statistics are missing. The message names them.
        """
        for feature, lacking in self.normalisation.incomplete.items():
            raise ClpError(
                f"{self.normalisation.modes[feature]} needs the statistics {', '.join(lacking)} of {feature}, "
                "which are missing",
                where=self.checkpoint.path,
                hint="add them to the data set (lerobot's augment_dataset_quantile_stats.py), "
                "or calibrate with --statistics bags",
            )


def feature_size(config: Any, feature: str, where: Path) -> int:
    """Returns the size of the state or the action in a policy's config.

    Args:
        config: lerobot's config of the policy.
        feature: :data:`STATE` or :data:`ACTION`.
        where: The checkpoint's folder, for the error.

    Raises:
        ClpError: The config does not have the feature.
    """
    field, found = {
        STATE: ("input_features", config.robot_state_feature),
        ACTION: ("output_features", config.action_feature),
    }[feature]
    if found is None or not found.shape:
        raise ClpError(
            f"{field} has no {feature}",
            where=where / CONFIG_FILE,
            hint=f"write {feature} there, with its type and shape",
        )
    return found.shape[0]
