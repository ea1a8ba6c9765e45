# SPDX-License-Identifier: Apache-2.0
"""torch.compile for inference: the denoising step, which runs ten times a chunk, as compiled kernels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    from clp_ros.policies.base import Policy


def compile_policy(policy: Policy, task: str, cuda_graphs: bool = True) -> float:
    """Compiles a policy's denoising step, in place, and predicts chunks so that no later one waits for it.

    lerobot's own ``compile_model`` compiles the whole sampling loop, ten steps unrolled, which takes many minutes and
    does not exist for every family. The encoding of the images and the instruction, once a chunk and bound by its
    matrix products, stays as it is.

    Args:
        policy: Any family's. Its actions change in their last digits (``clp verify --compile`` says by how much).
        task: The instruction. One of another length may have to be compiled anew, at its first chunk.
        cuda_graphs: Whether the step is, on CUDA, recorded as a graph, whose replay costs one launch instead of
            hundreds. torch replays it only in the thread that imported it first, as a rule the main one
            (github.com/pytorch/pytorch/issues/123177).

    Returns:
        Seconds it took.

    Raises:
        ClpError: The step cannot be compiled, here or at all.
    """
    import torch

    from clp_ros.policies.quiet import quiet

    start = time.perf_counter()
    if not policy.denoising_step:
        raise ClpError(
            f"a {policy.family_name} has no denoising step to compile",
            where=policy.path,
            fix="run it without compiling",
        )
    owner, _, name = policy.denoising_step.rpartition(".")
    module = policy.model.get_submodule(owner)
    step = getattr(module, name)
    setattr(module, name, torch.compile(step, mode="reduce-overhead" if cuda_graphs else "default"))
    try:
        with quiet():
            for _ in range(3):  # compiles; on CUDA runs once more, then records the graph
                policy.warm_up(task)
    except Exception as error:  # dynamo, inductor, triton and the C++ compiler each have exceptions of their own
        setattr(module, name, step)
        why = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ClpError(
            f"torch.compile fails on {policy.family_name}'s denoising step ({type(error).__name__}: {why})",
            where=policy.path,
            fix="run it without compiling; where torch lacks a compiler, install one (on a CPU: g++)",
        ) from error
    return time.perf_counter() - start
