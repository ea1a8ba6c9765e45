# SPDX-License-Identifier: Apache-2.0
"""Compiles the denoising step, which runs about ten times a chunk, with torch.compile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    from clp_ros.policies.base import Policy


def compile_policy(policy: Policy, task: str, cuda_graphs: bool = True) -> float:
    """Compiles a policy's denoising step in place, and predicts chunks until the compilation is complete.

    lerobot's ``compile_model`` compiles the whole sampling loop with its steps unrolled, which takes many minutes and
    does not exist for every family. The encoder of images and instruction is not compiled: it runs once a chunk, and
    its time is that of its matrix products.

    Args:
        policy: The policy. Its actions change in their last digits (``clp verify --compile`` measures this).
        task: The instruction. An instruction of another length may cause another compilation at its first chunk.
        cuda_graphs: Whether to record the step as a CUDA graph, which costs one launch instead of hundreds. PyTorch
            replays a graph only in the thread that first imported torch, usually the main thread
            (github.com/pytorch/pytorch/issues/123177).

    Returns:
        Duration in seconds.

    Raises:
        ClpError: The policy has no such step, or torch.compile fails.
    """
    import torch

    from clp_ros.policies.quiet import quiet

    start = time.perf_counter()
    if not policy.denoising_step:
        raise ClpError(
            f"{policy.family_name} has no denoising step to compile",
            where=policy.path,
            hint="run without compiling",
        )
    owner, _, name = policy.denoising_step.rpartition(".")
    module = policy.model.get_submodule(owner)
    step = getattr(module, name)
    setattr(module, name, torch.compile(step, mode="reduce-overhead" if cuda_graphs else "default"))
    try:
        with quiet():
            for _ in range(3):  # compiles, runs once more on CUDA, then records the graph
                policy.warm_up(task)
    except Exception as error:  # dynamo, inductor, triton and the C++ compiler raise many kinds
        setattr(module, name, step)
        why = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ClpError(
            f"torch.compile fails on {policy.family_name}'s denoising step ({type(error).__name__}: {why})",
            where=policy.path,
            hint="run without compiling, or install the compiler that PyTorch needs (on a CPU: g++)",
        ) from error
    return time.perf_counter() - start
