# SPDX-License-Identifier: Apache-2.0
"""Loads the policy node's policy, and frees its memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Policy
from clp_ros.policies.compilation import compile_policy

LoadPolicy = Callable[..., Policy]
"""Loads a policy from a checkpoint folder for a device; with heads, as :func:`load_policy`."""


class EndedError(Exception):
    """A signal ended ROS while the policy was being loaded."""


def load_policy(folder: Path, device: str, heads: Mapping[str, Path] | None = None, task: str = "") -> Policy:
    """Loads a checkpoint and computes a first chunk.

    The first chunk takes several times as long as the next ones, so it is computed while nothing moves.

    Args:
        folder: The checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        heads: Head folders by instruction; empty: the checkpoint has no heads.
        task: The instruction whose head is taken first.

    Raises:
        ClpError: The checkpoint or a head cannot be loaded, or has no statistics for state or action.
    """
    # Imported here: torch and lerobot take seconds, and only a node that runs needs them.
    from clp_ros.policies.loading import load_policy as load

    policy: Policy = load(folder, device)
    if heads:
        from clp_ros.training.task_heads import load_task_heads

        policy = load_task_heads(policy, heads, task)
    policy.check_normalised()
    policy.warm_up()
    return policy


def compile_for_node(policy: Policy, mode: str, instruction: str) -> None:
    """Compiles the policy's denoising step.

    Args:
        policy: The policy.
        mode: How chunks are joined.
        instruction: The task, for the first chunk.

    Raises:
        ClpError: The mode is ``rtc``, or the policy cannot be compiled.
    """
    if mode == "rtc":
        raise ClpError(
            "a compiled policy cannot continue its last chunk",
            where="policy",
            hint="set mode to replace or ensemble, or compile to false",
        )
    compile_policy(policy, instruction, cuda_graphs=False)  # the worker's thread cannot replay CUDA graphs


def freeze_memory() -> None:
    """Excludes the loaded policy from garbage collection.

    Otherwise a collection visits half a million objects from time to time, and stops all threads for 0.3 s.
    """
    gc.collect()
    gc.freeze()


def free_memory() -> None:
    """Frees the memory of a policy that is no longer referenced, also on the GPU."""
    if (torch := sys.modules.get("torch")) is not None:
        gc.unfreeze()
        gc.collect()  # a model is full of reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
