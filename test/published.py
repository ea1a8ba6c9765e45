# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as their makers publish them, small: base models whose statistics are not those of any robot here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from clp_ros.core.files import rewrite_json
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import family_named

Documents = Mapping[str, dict[str, Any]]


def features(cameras: tuple[str, ...], size: int) -> PolicyFeatures:
    """A policy of these cameras with as many components in its state as in its actions."""
    zeros, ones = (0.0,) * size, (1.0,) * size
    features = {f"observation.images.{name}": (64, 64) for name in cameras}
    return PolicyFeatures(features, size, size, zeros, ones, zeros, ones)


def make(family: str, folder: Path, wanted: PolicyFeatures) -> Path:
    """A tiny checkpoint of random weights."""
    folder.mkdir(parents=True)
    with quiet():
        family_named(family).make_checkpoint("tiny", folder, folder, wanted, 0)
    return folder


def processors(change: Callable[[dict[str, Any]], None]) -> Callable[[Documents], None]:
    """Changes each normaliser step of a checkpoint's processors, for :func:`clp_ros.core.files.rewrite_json`."""

    def apply(documents: Documents) -> None:
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            for step in documents[name]["steps"]:
                if "normalizer" in step["registry_name"]:
                    change(step)

    return apply


def smolvla_base(folder: Path) -> Path:
    """As lerobot/smolvla_base: 6 components, three cameras, the statistics under names of the robots it was made on."""
    make("smolvla", folder, features(("camera1", "camera2", "camera3"), 6))
    for file in folder.glob("policy_*.safetensors"):
        save_file({f"so100.buffer.{name}": value for name, value in load_file(file).items()}, file)
    return folder


def pi_base(family: str, folder: Path) -> Path:
    """As lerobot/pi0_base and pi05_base: 32 components, three cameras, normaliser steps that know no feature."""
    make(family, folder, features(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), 32))

    def forget(step: dict[str, Any]) -> None:
        (folder / step.pop("state_file")).unlink()
        step["config"]["features"] = {}

    rewrite_json(folder, processors(forget))
    return folder
