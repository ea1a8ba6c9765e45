# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints strictly with lerobot's classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clp_ros.checkpoints.folder import CONFIG_FILE, PROCESSORS
from clp_ros.checkpoints.hub import missing_repository
from clp_ros.checkpoints.tensor_check import check_tensors
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import Family, check_lerobot
from clp_ros.policies.lerobot_features import feature_size
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.processors import load_processors
from clp_ros.policies.quiet import quiet
from clp_ros.policies.statistics import ACTION

if TYPE_CHECKING:
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy


def resolve_device(device: str) -> str:
    """Returns the device; ``auto`` means CUDA if available, otherwise the CPU.

    Raises:
        ClpError: The device is unknown or not available.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ClpError(f"unknown device {device!r}", where="device", hint="use auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ClpError(
            f"this machine has no device {device!r}",
            where="device",
            hint="use cpu, or one of its GPUs with a CUDA build of PyTorch",
        )
    return device


def load_policy(
    folder: str | Path, device: str = "auto", dtype: str = "auto", mapped: bool = False, weights: bool = True
) -> LeRobotPolicy:
    """Loads a checkpoint strictly with lerobot's classes; offline if the folder has all files.

    Args:
        folder: The checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as lerobot loads it) or ``float32``.
        mapped: Memory-map weights that have the model's dtype. The system can reclaim this memory at any time, so that
            a model larger than the memory runs, although slowly. On the CPU only. The last bits of results may differ,
            because kernels depend on the alignment of the weights.
        weights: Whether to load the weights. Otherwise they are :func:`clp_ros.policies.empty_weights.fake_weights`, on
            the CPU.

    Raises:
        ClpError: The folder is not a complete checkpoint of a known family, or does not fit lerobot's model.
    """
    from clp_ros.policies.empty_weights import assign_weights, fake_weights

    checkpoint = Checkpoint.open(Path(folder))
    check_lerobot(checkpoint.family)
    device = resolve_device(device) if weights else "cpu"
    if dtype not in ("auto", "float32"):
        raise ClpError(f"unknown dtype {dtype!r}", where="dtype", hint="use auto or float32")
    with quiet():
        policy = build_model(checkpoint.family, checkpoint.path, device)
        feature_size(policy.config, ACTION, checkpoint.path)  # lerobot's models read it for every chunk
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        check_tensors(policy, checkpoint.model_names, shapes, checkpoint.path)
        if dtype == "float32":
            policy.float()
        if weights:
            assign_weights(policy, _read_tensors(checkpoint), copy=device == "cpu" and not mapped)
            policy.to(device)
        else:
            fake_weights(policy)
        policy.eval()
        files = [checkpoint.path / name for name in PROCESSORS]
        with _reported("the processors do not load", checkpoint.path, "save them again with this lerobot", *files):
            preprocessor, postprocessor = load_processors(checkpoint, device)
    return LeRobotPolicy(checkpoint, policy, preprocessor, postprocessor, device)


def build_model(family: Family, folder: Path, device: str, where: Path | None = None) -> PreTrainedPolicy:
    """Builds lerobot's policy for a checkpoint on the meta device, without reading weights.

    Args:
        family: The checkpoint's family.
        folder: The folder with config.json and the files it points to.
        device: Name of the policy's device.
        where: The checkpoint's folder, for the error; by default ``folder``.

    Raises:
        ClpError: lerobot cannot build it.
    """
    from clp_ros.policies.empty_weights import empty_weights

    where = where or folder
    reported = _reported(
        "lerobot cannot build the model", where, "check config.json and what it points to", folder / CONFIG_FILE
    )
    with reported, empty_weights():
        return family.build(folder, device)


def _read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    weights: dict[str, torch.Tensor] = {}
    for file in checkpoint.weight_files:
        with safe_open(checkpoint.path / file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        checkpoint.check_unchanged(file)
    return {name: weights[stored] for name, stored in checkpoint.model_names.items()}


@contextlib.contextmanager
def _reported(what: str, where: object, hint: str, *files: Path) -> Iterator[None]:
    """Converts a library's exception about the given files into a ClpError.

    ``files`` are JSON files that may name a missing repository.
    """
    try:
        yield
    except ClpError:
        raise
    except Exception as error:  # lerobot, draccus, transformers and the Hub raise many kinds
        if missing := missing_repository(error, *map(read_json_object, files)):
            raise missing.at(where) from error
        raise ClpError(f"{what} ({type(error).__name__}: {error})", where=where, hint=hint) from error
