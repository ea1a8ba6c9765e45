# SPDX-License-Identifier: Apache-2.0
"""Checks that stock lerobot loads a checkpoint strictly, that it runs, and that its manifest is correct."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros.checkpoints.folder import WEIGHTS_FILE
from clp_ros.checkpoints.hub import missing_repository
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from clp_ros.policies.base import Policy
    from clp_ros.policies.lerobot_policy import LeRobotPolicy


# Allowed difference of the compiled policy's actions, relative to the chunk's largest action, by dtype of the weights.
# Compiled kernels sum in another order, and ten steps accumulate the rounding errors.
COMPILED_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def verify(folder: str | Path, device: str = "cpu", compiled: bool = False) -> dict[str, Any]:
    """Loads a checkpoint strictly with stock lerobot, runs one chunk, and checks its manifest.

    Args:
        folder: The checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        compiled: Whether to also compile the denoising step and compare the actions.

    Returns:
        ``path``, ``family``, ``layers``, ``parameters``, ``pruned`` (whether it has a manifest), ``chunk`` (its shape)
        and ``source`` (``unchanged``, ``changed``, ``absent`` or ``none``), ``cameras`` (those that were used),
        ``left_out_cameras`` (those of its config without statistics, if others have them), ``raw_features`` (which of
        state and action lerobot does not normalise, because statistics are missing); if compiled,
        ``compiled_difference`` (the largest, as a share of the largest action) and ``compiled_tolerance``.

    Raises:
        ClpError: A check fails. The message names it.
    """
    checkpoint = Checkpoint.open(folder)
    source = _check_manifest(checkpoint)
    policy = _load(checkpoint, device)
    chunk = _chunk(policy)
    if not np.isfinite(chunk).all():
        raise ClpError(
            "the action chunk is not finite", where=checkpoint.path, hint="give an undamaged copy of the weights"
        )
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.family.name,
        "layers": checkpoint.layers,
        "parameters": checkpoint.parameters(),
        "pruned": checkpoint.manifest is not None,
        "source": source,
        "chunk": list(chunk.shape),
        "cameras": list(policy.cameras),
        "left_out_cameras": list(policy.left_out_cameras),
        "raw_features": list(policy.raw_features),
        **(_compiled(policy, chunk) if compiled else {}),
    }


def _check_manifest(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    if manifest is None:
        return "none"
    where = checkpoint.path / "clp.json"
    promised, held = manifest["parameters"]["after"], checkpoint.parameters()
    if promised != held:
        raise ClpError(
            f"the manifest says {promised} parameters, but the weights hold {held}",
            where=where,
            hint="prune the source again",
        )
    source = Path(manifest["source"]["path"])
    if not source.is_dir():
        return "absent"
    try:
        same = Checkpoint.open(source).fingerprint() == manifest["source"]["fingerprint"]
    except ClpError:  # the source's folder now holds something else, which is not an error of this checkpoint
        same = False
    return "unchanged" if same else "changed"


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and bool(((mine == theirs) | (mine != mine)).all())


def _load(checkpoint: Checkpoint, device: str) -> LeRobotPolicy:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    from clp_ros.policies.loading import load_policy
    from clp_ros.policies.quiet import quiet

    # First with load_policy, whose errors name the tensor; then with lerobot's loader, as in lerobot-train. The first
    # stays memory-mapped, so that both together need the memory of one.
    ours = load_policy(checkpoint.path, device, mapped=True)
    if WEIGHTS_FILE not in checkpoint.files:
        raise ClpError(
            f"stock lerobot does not load the checkpoint: it reads one {WEIGHTS_FILE}, not shards",
            where=checkpoint.path,
            hint="merge the shards into one file, or prune the checkpoint with `clp prune`, which merges them",
        )
    hint = "save the checkpoint again with this lerobot"
    if "vlm_model_name" in checkpoint.config:
        hint = "for a moved checkpoint, run `clp prune`, which writes the new path, or give --policy.vlm_model_name"
    try:
        with quiet():
            config = PreTrainedConfig.from_pretrained(checkpoint.path)
            config.device = ours.device
            if hasattr(config, "compile_model"):
                config.compile_model = False  # compilation is checked with --compile
            stock = get_policy_class(config.type).from_pretrained(checkpoint.path, config=config, strict=True)
    except Exception as error:  # lerobot, draccus, transformers and the Hub raise many kinds
        # lerobot first loads the VLM's weights, which load_policy does not need.
        if missing := missing_repository(error, checkpoint.config):
            raise missing.at(checkpoint.path, "stock lerobot does not load the checkpoint: ") from error
        raise ClpError(
            f"stock lerobot does not load the checkpoint ({error})", where=checkpoint.path, hint=hint
        ) from error
    mine, theirs = ours.policy.state_dict(), stock.state_dict()
    if list(mine) != list(theirs):
        raise ClpError("stock lerobot's model has other tensors", where=checkpoint.path, hint=hint)
    differing = [name for name in mine if not _same(mine[name], theirs[name])]
    if differing:
        raise ClpError(f"stock lerobot loads other values of {differing[0]!r}", where=checkpoint.path, hint=hint)
    ours.policy = stock
    return ours


def _chunk(policy: Policy) -> np.ndarray:
    """Predicts a chunk from fixed noise."""
    from clp_ros.evaluation.flops import random_observation
    from clp_ros.policies.random_weights import seeded

    try:
        with seeded(0):
            return policy.predict_chunk(**random_observation(policy))
    except ClpError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # The cause is a field of config.json that lerobot does not check when it builds the model.
        raise ClpError(
            f"stock lerobot loads the checkpoint, but fails to predict ({type(error).__name__}: {error})",
            where=policy.path,
            hint="check config.json",
        ) from error


def _compiled(policy: Policy, eager: np.ndarray) -> dict[str, float]:
    from clp_ros.evaluation.flops import INSTRUCTION
    from clp_ros.policies.compilation import compile_policy

    compile_policy(policy, INSTRUCTION)
    floats = {str(weight.dtype).removeprefix("torch.") for weight in policy.model.parameters()}
    tolerance = COMPILED_TOLERANCE["float32" if floats == {"float32"} else "bfloat16"]
    difference = float(np.abs(_chunk(policy) - eager).max() / np.abs(eager).max())
    if not difference <= tolerance:
        raise ClpError(
            f"compiled, the actions differ by {difference:.1e} of the largest, more than {tolerance:.0e}",
            where=policy.path,
            hint="run without compiling",
        )
    return {"compiled_difference": difference, "compiled_tolerance": tolerance}
