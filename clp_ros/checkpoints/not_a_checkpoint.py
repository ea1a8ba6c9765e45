# SPDX-License-Identifier: Apache-2.0
"""Folders that people give in place of a checkpoint, and checkpoints that today's lerobot does not read: what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object

# Where lerobot-train puts the checkpoint within a step's folder, a run's checkpoints, and a run's output.
_TRAINED = ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model")
_ADAPTER_FILE = "adapter_config.json"
_OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def is_pickle(name: str) -> bool:
    """Whether a file is a pickle by its name: loading one can run any code, so none is ever opened or copied."""
    return Path(name).suffix.lower() in _PICKLES


def refuse_training_folder(folder: Path) -> None:
    """Refuses a folder of ``lerobot-train`` that has the checkpoint in a folder of its own.

    Raises:
        ClpError: It is one; the message names the checkpoint's folder.
    """
    if (folder / "config.json").is_file():
        return
    for name in _TRAINED:
        if (folder / name / "config.json").is_file():
            raise ClpError(
                "this is a training's folder, the checkpoint is one of those in it",
                where=folder,
                fix=f"give {folder / name}",
            )


def refuse_missing_weights(folder: Path, files: Collection[str], pickles: Collection[str]) -> None:
    """Tells what a folder with a config.json and without safetensors weights is.

    Raises:
        ClpError: It is a PEFT adapter, or its weights are pickles.
    """
    if _ADAPTER_FILE in files:
        base = read_json_object(folder / _ADAPTER_FILE).get("base_model_name_or_path")
        raise ClpError(
            f"this is a PEFT adapter of {base or 'a base it does not name'}, not a whole policy",
            where=folder,
            fix="merge it into its base first, as doc/how-to/checkpoints.md shows",
        )
    if weights := sorted(name for name in pickles if "/" not in name and "model" in name.lower()) or sorted(pickles):
        raise ClpError(
            "the weights are in a pickle file, which can run any code when it is loaded",
            where=folder / weights[0],
            fix="save them as model.safetensors, on a machine where you trust the file",
        )


def refuse_old_statistics(folder: Path, tensors: Collection[str]) -> None:
    """Refuses a checkpoint from before lerobot 0.4, which has its normalisation statistics among the weights.

    Raises:
        ClpError: It is one; the message names lerobot's command that converts it.
    """
    if any(name.startswith(_OLD_STATISTICS) for name in tensors):
        command = "python -m lerobot.processor.migrate_policy_normalization"
        raise ClpError(
            "it is from before lerobot 0.4: the normalisation statistics are among the weights",
            where=folder,
            fix=f"{command} --pretrained-path {folder} --output-dir {folder}_migrated",
        )


def refuse_missing_state(path: Path, document: Any, files: Collection[str]) -> None:
    """Refuses a processor of which a step's tensors, its statistics for one, are not in the folder.

    Args:
        path: Its JSON file.
        document: What that holds.
        files: Names of the folder's files.

    Raises:
        ClpError: A step names a file that is not there.
    """
    steps = document.get("steps") if isinstance(document, dict) else None
    for step in steps if isinstance(steps, list) else ():
        name = step.get("state_file") if isinstance(step, dict) else None
        if name is not None and (not isinstance(name, str) or name not in files):
            raise ClpError(
                f"{path.name} names {name!r}, which is not in the folder",
                where=path.parent,
                fix="give a whole copy of the checkpoint",
            )


def unregistered_step(name: str, path: Path, elsewhere: Mapping[str, str], installed: str) -> ClpError:
    """What to say of a processor step that the installed lerobot does not know.

    Args:
        name: The step's ``registry_name``.
        path: The file it stands in.
        elsewhere: The versions of lerobot that have a step, by name.
        installed: The installed version of lerobot.
    """
    if versions := elsewhere.get(name):
        return ClpError(
            f"the processor step {name} is one of lerobot {versions}; installed is {installed}",
            where=path,
            fix=f'pip install "lerobot{versions}", in an environment of its own, or save it with lerobot {installed}',
        )
    return ClpError(
        f"the installed lerobot {installed} has no processor step {name}",
        where=path,
        fix="install the lerobot that saved the checkpoint, or the package that the step is from",
    )
