# SPDX-License-Identifier: Apache-2.0
"""Checks before a surgery that the result will load: its tensors against lerobot's model, and its processors."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

from clp_ros.checkpoints.folder import CONFIG_FILE
from clp_ros.core.errors import ClpError, NotHereError
from clp_ros.policies.checkpoint import model_names
from clp_ros.policies.family import check_lerobot
from clp_ros.pruning.surgery import SurgeryPlan


def check_loadable(plan: SurgeryPlan) -> str | None:
    """Compares the names and shapes that a surgery will write with the model of its config.json.

    The model is lerobot's, built on the meta device: neither weights nor memory for them are needed. The processors,
    which a surgery copies, are checked too.

    Args:
        plan: The surgery.

    Returns:
        None if they agree; otherwise, why it is unknown on this machine.

    Raises:
        ClpError: The result would not load, or lerobot cannot build the model.
    """
    checkpoint = plan.checkpoint
    if find_spec("lerobot") is None:
        return "lerobot is not installed here"
    try:
        check_lerobot(checkpoint.family)
    except ClpError as error:
        return error.what
    if not checkpoint.family.loads(plan.config):
        return "lerobot loads this layout only as the base model of a fine-tuning"
    from clp_ros.checkpoints.tensor_check import check_tensors
    from clp_ros.policies.loading import build_model
    from clp_ros.policies.processors import read_processors
    from clp_ros.policies.quiet import quiet

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in {name.partition("/")[0] for name in plan.copied_files()}:
            (folder / name).symlink_to(checkpoint.path / name)
        (folder / CONFIG_FILE).write_text(json.dumps(plan.config), encoding="utf-8")
        try:
            with quiet():
                model = build_model(checkpoint.family, folder, "cpu", where=checkpoint.path)
        except NotHereError as error:
            return error.what
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items()}
    try:
        check_tensors(model, model_names(checkpoint.family, shapes), shapes, checkpoint.path)
    except ClpError as error:
        raise ClpError(f"the result would not load: {error.what}", where=error.where, hint=error.hint) from error
    try:
        read_processors(checkpoint)
    except NotHereError as error:
        return error.what
    return None
