# SPDX-License-Identifier: Apache-2.0
"""What a policy of lerobot's takes and gives: its cameras, its sizes, and the statistics it is normalised by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Policy
from clp_ros.policies.checkpoint import CONFIG_FILE, Checkpoint
from clp_ros.policies.family import Family
from clp_ros.policies.normalisation import Normalisation, normalise_by, read_normalisation
from clp_ros.policies.processors import rename_map
from clp_ros.policies.statistics import ACTION, STATE, Statistics

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy


@dataclass
class LeRobotFeatures(Policy):
    """The part of a policy of lerobot's that says what it takes and gives, and what it is normalised by.

    Attributes:
        checkpoint: What it was loaded from.
        policy: lerobot's policy, in evaluation mode.
        preprocessor: lerobot's pipeline of observations and actions into batches.
        postprocessor: lerobot's pipeline of the model's actions into the robot's.
        device: Where it runs, e.g. ``cpu`` or ``cuda``.
        statistics: Those given with :meth:`normalise_by`; None while they are the checkpoint's own.
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
        """The family the checkpoint belongs to."""
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
        """What its processors normalise by."""
        return read_normalisation(
            self.preprocessor, self.postprocessor, self.policy.config, rename_map(self.checkpoint)
        )

    @property
    @override
    def camera_sizes(self) -> Mapping[str, tuple[int, int]]:
        features = self.policy.config.image_features
        return {name: tuple(features[name].shape[1:]) for name in self.image_slots}

    @property
    def image_slots(self) -> tuple[str, ...]:
        """All camera features of its config, in its own order, without those that lerobot itself leaves empty."""
        return tuple(name for name in self.policy.config.image_features if ".empty_camera_" not in name)

    @property
    @override
    def cameras(self) -> tuple[str, ...]:
        """The camera features it is given, in its own order.

        From :meth:`check_features` on those that the robot has; before, those that have statistics, since it was
        trained on them, or else all.
        """
        trained = self._trained_cameras
        return self._given_cameras or tuple(name for name in self.image_slots if not trained or name in trained)

    @property
    @override
    def left_out_cameras(self) -> tuple[str, ...]:
        """Camera features of its config that it is not given: lerobot's model runs without them."""
        return tuple(name for name in self.image_slots if name not in self.cameras)

    @property
    @override
    def state_size(self) -> int:
        """Length of ``observation.state``: that of its statistics, since fine-tuning keeps the base's config entry."""
        return self.normalisation.sizes.get(STATE) or feature_size(self.policy.config, STATE, self.checkpoint.path)

    @property
    @override
    def action_size(self) -> int:
        """Length of one action: that of its statistics, or else of ``output_features``."""
        return self.normalisation.sizes.get(ACTION) or feature_size(self.policy.config, ACTION, self.checkpoint.path)

    @property
    @override
    def chunk_size(self) -> int:
        return len(self.policy.config.action_delta_indices)  # as trained: a GR00T may have fewer than its chunk_size

    @property
    def _trained_cameras(self) -> frozenset[str]:
        """The cameras of the data set it was trained on; none where that is not known, or it cannot run without one."""
        if not self.family.skips_absent_cameras:
            return frozenset()
        return self.normalisation.cameras & frozenset(self.image_slots)

    @override
    def check_features(self, cameras: Collection[str], action_size: int, whose: str) -> list[str]:
        """As :meth:`Policy.check_features`; from then on the policy is given the robot's cameras.

        A camera of the policy's that the robot does not have is left out as lerobot leaves it out: where the family's
        model can run without, and the robot has at least one of the others. The user is told of each, and of each
        that the policy was not trained on.
        """
        notes = self.check_cameras(cameras, whose)
        # Without statistics the state's size is the base model's, which lerobot pads, and never looks at.
        padded = STATE not in self.normalisation.sizes and action_size <= getattr(
            self.policy.config, "max_state_dim", 0
        )
        if self.action_size != action_size or (self.state_size != action_size and not padded):
            raise ClpError(
                f"the policy's state has {self.state_size} and its action {self.action_size} components; "
                f"{whose} has {action_size} joints",
                where=self.checkpoint.path,
                fix="use a checkpoint that was trained for this embodiment"
                if not self.normalisation.missing
                else "fine-tune it for this robot first; to calibrate it as it is, give --statistics",
            )
        return notes

    @override
    def check_cameras(self, cameras: Collection[str], whose: str) -> list[str]:
        absent, unknown = set(self.image_slots) - set(cameras), set(cameras) - set(self.image_slots)
        if unknown or not cameras or (absent and not self.family.skips_absent_cameras):
            raise ClpError(
                f"the policy's cameras are {', '.join(sorted(self.image_slots)) or 'none'}; "
                f"{whose} has {', '.join(sorted(cameras)) or 'none'}",
                where=self.checkpoint.path,
                fix="give each camera the policy's feature that it feeds, in the embodiment",
            )
        self._given_cameras = tuple(name for name in self.image_slots if name in cameras)
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
            ClpError: They lack what the policy normalises by, do not fit its size, or its processors take none.
        """
        config, where = self.policy.config, self.checkpoint.path
        for feature, width in ((STATE, "max_state_dim"), (ACTION, "max_action_dim")):
            most = getattr(config, width, None)
            size = statistics.size(feature)
            if most is not None and size > most:
                raise ClpError(
                    f"the statistics of {feature} have {size} components, the policy takes at most {most}",
                    where=where,
                    fix="use the statistics of this robot's data, or another checkpoint",
                )
        if not normalise_by(self.preprocessor, self.postprocessor, config, statistics):
            raise ClpError(
                f"{self.family.name}'s processors take no statistics",
                where=where,
                fix="calibrate it without --statistics",
            )
        self.statistics = statistics
        vars(self).pop("normalisation", None)  # read anew
        self.check_complete()

    @override
    def describe_statistics(self) -> dict[str, Any]:
        """Where its statistics come from, for JSON: ``source`` (``checkpoint``, ``dataset``, ``bags`` or ``none``).

        With ``raw``, the features that lerobot does not normalise for want of them, and the ``values`` of those given.
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
        """Refuses statistics that lack what the policy normalises by: lerobot fails on them.

        Raises:
            ClpError: Some are missing; it names them.
        """
        for feature, lacking in self.normalisation.incomplete.items():
            raise ClpError(
                f"{self.normalisation.modes[feature]} needs the statistics {', '.join(lacking)} of {feature}, "
                "which are not there",
                where=self.checkpoint.path,
                fix="add them to the data set (lerobot's augment_dataset_quantile_stats.py); "
                "calibrating goes without with --statistics bags",
            )


def feature_size(config: Any, feature: str, where: Path) -> int:
    """The size of the state or the action in a policy's config.

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
            f"there is no {feature} among its {field}",
            where=where / CONFIG_FILE,
            fix="write it there, with its type and shape",
        )
    return found.shape[0]
