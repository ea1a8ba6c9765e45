# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint's processors without running code chosen by the checkpoint."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clp_ros.checkpoints.folder import PROCESSORS
from clp_ros.checkpoints.not_a_checkpoint import unregistered_step
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import Family
from clp_ros.policies.normalisation import MODE_STATISTICS
from clp_ros.policies.statistics import ACTION

# This step loads a model by name and runs the model's code.
_REWARD_CLASSIFIER = "reward_classifier_processor"
_RENAME = "rename_observations_processor"
# Steps that only some versions of lerobot have.
_STEPS_ELSEWHERE = {"delta_actions_processor": ">=0.5.1,<0.6", "relative_actions_processor": ">=0.6"}


def load_processors(checkpoint: Checkpoint, device: str) -> tuple[Any, Any]:
    """Loads a checkpoint's preprocessor and postprocessor as lerobot's pipelines.

    The preprocessor's renaming is disabled: see :func:`rename_map`.

    Raises:
        ClpError: See :func:`read_processors`.
    """
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import (
        batch_to_transition,
        policy_action_to_transition,
        transition_to_batch,
        transition_to_policy_action,
    )

    from clp_ros.core.compat.lerobot import link_relative_actions

    with _local_files(checkpoint, read_processors(checkpoint)) as folder:
        preprocessor = PolicyProcessorPipeline.from_pretrained(
            folder,
            config_filename=PROCESSORS[0],
            overrides={"device_processor": {"device": device}},
            to_transition=batch_to_transition,
            to_output=transition_to_batch,
        )
        postprocessor = PolicyProcessorPipeline.from_pretrained(
            folder,
            config_filename=PROCESSORS[1],
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )
    link_relative_actions(preprocessor, postprocessor)
    if checkpoint.family.link_processors is not None:
        checkpoint.family.link_processors(preprocessor, postprocessor)
    return preprocessor, postprocessor


def read_processors(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Reads and checks the JSON files of a checkpoint's processors, by file name.

    Paths into the checkpoint lead into its current folder.

    Raises:
        NotHereError: The installed lerobot does not have a step.
        ClpError: A processor is missing, a step would run code chosen by the checkpoint, or a statistic is not finite.
    """
    for name in PROCESSORS:
        if not (checkpoint.path / name).is_file():
            raise ClpError(
                f"{name} is missing",
                where=checkpoint.path,
                hint="save the policy together with its processors, as lerobot 0.4 and later do",
            )
    documents = {name: read_json_object(checkpoint.path / name) for name in PROCESSORS}
    checkpoint.family.rewrite_local_paths(documents, checkpoint.path, checkpoint.path)
    for name, document in documents.items():
        _check_steps(document, checkpoint.path / name, checkpoint.family)
        _check_statistics(document, checkpoint.path)
    return documents


def rename_map(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the renaming that ``lerobot-train --rename_map`` saved in the preprocessor: data set's name -> policy's
    name.

    Observations here already have the policy's names. Another renaming would exchange or drop cameras.

    Raises:
        ClpError: It does not map names to names.
    """
    path = checkpoint.path / PROCESSORS[0]
    names: dict[str, str] = {}
    for step in read_json_object(path).get("steps", []):
        if step.get("registry_name") == _RENAME:
            given = step.get("config", {}).get("rename_map") or {}
            if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
                raise ClpError("rename_map does not map names to names", where=path, hint="save the policy again")
            names |= given
    return names


@contextlib.contextmanager
def _local_files(checkpoint: Checkpoint, documents: Mapping[str, dict[str, Any]]) -> Iterator[Path]:
    """Yields a folder with the processors' files, whose renaming is disabled."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, document in documents.items():
            for step in document["steps"]:
                if step["registry_name"] == _RENAME:
                    step["config"] = {**step.get("config", {}), "rename_map": {}}
            (folder / name).write_text(json.dumps(document), encoding="utf-8")
        for state in checkpoint.path.glob("*.safetensors"):
            (folder / state.name).symlink_to(state)
        yield folder


def _check_steps(document: Mapping[str, Any], path: Path, family: Family) -> None:
    """Refuses steps that would make lerobot run code chosen by the checkpoint.

    lerobot imports a step without ``registry_name`` by the Python path in ``class``, even ``subprocess.Popen``, and
    calls it with the checkpoint's arguments. Its action tokenizer runs Python files of the tokenizer unless disabled,
    and its reward classifier those of a model. Steps of some policies do the same: each family checks its own, and
    other families' steps are refused.

    Raises:
        ClpError: There is such a step.
    """
    from importlib.metadata import version

    from lerobot.processor import ProcessorStepRegistry

    for step in document["steps"]:
        if "registry_name" not in step:
            raise ClpError(
                f"a step would import and run the class {step.get('class')!r}",
                where=path,
                hint="remove the step: only steps with a registry_name of the installed lerobot are loaded",
            )
        name = step["registry_name"]
        if name not in ProcessorStepRegistry.list():
            raise unregistered_step(name, path, _STEPS_ELSEWHERE, version("lerobot"))
        registered = ProcessorStepRegistry.get(name)
        package = registered.__module__
        foreign = package.startswith("lerobot.policies.") and package.split(".")[2] != (family.policy or family.name)
        if foreign or name == _REWARD_CLASSIFIER:
            raise ClpError(
                f"{family.name} does not use the step {name}, which might run code chosen by the checkpoint",
                where=path,
                hint="remove the step",
            )
        by_default = getattr(registered, "trust_remote_code", False)
        if step.get("config", {}).get("trust_remote_code", by_default):
            raise ClpError(
                f"the step {name} would run code that comes with its tokenizer",
                where=path,
                hint="set trust_remote_code to false in the step's config",
            )


def _check_statistics(document: Mapping[str, Any], folder: Path) -> None:
    """Refuses normalisation statistics with NaN or Inf, which would make every action NaN.

    Unused statistics are not checked.

    Raises:
        ClpError: A statistic is not finite. The message names the file and the key.
    """
    from safetensors import safe_open

    for step in document["steps"]:
        path = folder / step.get("state_file", "")
        if not path.is_file():
            continue  # the step has no statistics, or lerobot reports the missing file
        config = step.get("config", {})
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if _is_used(key, config) and not tensors.get_tensor(key).isfinite().all():
                    raise ClpError(
                        f"the statistic {key!r} is not finite",
                        where=path,
                        hint="compute the data set's statistics again without NaN and Inf, and save the policy",
                    )


def _is_used(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a step uses a statistic, ``<feature>.<statistic>``. A step without modes may use any."""
    if "norm_map" not in config:
        return True
    feature, _, statistic = key.rpartition(".")
    # Actions are normalised even if they are not among the features.
    kind = "ACTION" if feature == ACTION else config.get("features", {}).get(feature, {}).get("type")
    return statistic in MODE_STATISTICS.get(config["norm_map"].get(kind), ())
