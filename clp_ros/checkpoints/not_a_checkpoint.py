# SPDX-License-Identifier: Apache-2.0
"""Recognises folders that are not checkpoints, and checkpoints that today's lerobot cannot read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError, NotHereError
from clp_ros.core.json_object import read_json_object

# Paths of checkpoints inside a step's folder, a run's checkpoints folder and a run's output folder of lerobot-train.
# A copy of a run may lack the link `last`; the last step's folder then sorts last, because names have leading zeros.
_STEPS = ("last/pretrained_model", "[0-9]*/pretrained_model")
_TRAINED = ("pretrained_model", *_STEPS, *(f"checkpoints/{path}" for path in _STEPS))
_ADAPTER_FILE = "adapter_config.json"
_OLD_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def is_pickle(name: str) -> bool:
    """Whether a file is a pickle, by its name. Loading a pickle can run any code, so it is never opened or copied."""
    return Path(name).suffix.lower() in _PICKLES


def refuse_training_folder(folder: Path) -> None:
    """Refuses an output folder of ``lerobot-train`` that has the checkpoint in a sub-folder.

    Raises:
        ClpError: The folder is one. The message names the checkpoint's folder.
    """
    if (folder / "config.json").is_file():
        return
    for path in _TRAINED:
        if found := sorted(folder.glob(f"{path}/config.json")):
            raise ClpError(
                "the folder is the output of a training, with checkpoints in it",
                where=folder,
                hint=f"give {found[-1].parent}",
            )


def refuse_adapter(folder: Path) -> None:
    """Refuses a folder that holds a PEFT adapter instead of a policy's weights.

    Raises:
        ClpError: The folder does. The message names the base model.
    """
    if (folder / _ADAPTER_FILE).is_file():
        base = read_json_object(folder / _ADAPTER_FILE).get("base_model_name_or_path")
        raise ClpError(
            f"the folder holds a PEFT adapter of {base or 'an unnamed base model'}, not a whole policy",
            where=folder,
            hint="merge it into its base model first, as doc/how-to/checkpoints.md shows",
        )


def refuse_pickled_weights(folder: Path, pickles: Collection[str]) -> None:
    """Refuses weights as pickles in a folder without safetensors weights.

    Raises:
        ClpError: The folder has pickles. The message names the file.
    """
    if weights := sorted(name for name in pickles if "/" not in name and "model" in name.lower()) or sorted(pickles):
        raise ClpError(
            "the weights are in a pickle file, which can run any code when it is loaded",
            where=folder / weights[0],
            hint="save them as model.safetensors, on a machine where you trust the file",
        )


def refuse_old_statistics(folder: Path, tensors: Collection[str]) -> None:
    """Refuses a checkpoint from before lerobot 0.4, which has its normalisation statistics among the weights.

    Raises:
        ClpError: The checkpoint is that old. The message names lerobot's command that converts it.
    """
    if any(name.startswith(_OLD_STATISTICS) for name in tensors):
        command = "python -m lerobot.processor.migrate_policy_normalization"
        raise ClpError(
            "lerobot before 0.4 saved the checkpoint: the normalisation statistics are among the weights",
            where=folder,
            hint=f"run `{command} --pretrained-path {folder} --output-dir {folder}_migrated`",
        )


def refuse_missing_state(path: Path, document: Any, files: Collection[str]) -> None:
    """Refuses a processor if a step's tensors, such as its statistics, are not in the folder.

    Args:
        path: Its JSON file.
        document: The content of that file.
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
                hint="give a complete copy of the checkpoint",
            )


def unregistered_step(name: str, path: Path, elsewhere: Mapping[str, str], installed: str) -> NotHereError:
    """Returns the error for a processor step that the installed lerobot does not have.

    Args:
        name: The step's ``registry_name``.
        path: The file that names it.
        elsewhere: The versions of lerobot that have a step, by name.
        installed: The installed version of lerobot.
    """
    if versions := elsewhere.get(name):
        return NotHereError(
            f"the processor step {name} needs lerobot {versions}, but {installed} is installed",
            where=path,
            hint=f'run `pip install "lerobot{versions}"` in a separate environment, or save with lerobot {installed}',
        )
    return NotHereError(
        f"the installed lerobot {installed} has no processor step {name}",
        where=path,
        hint="install the lerobot version that saved the checkpoint, or the package that has the step",
    )
