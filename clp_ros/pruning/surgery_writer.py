# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a surgery plan: weights by byte ranges and slices; other files are copied or rewritten."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clp_ros.checkpoints.folder import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.pruning.byte_ranges import RangeCopier, reserve
from clp_ros.pruning.surgery_plan import SurgeryPlan

Progress = Callable[[int, int], None]


def write_checkpoint(
    plan: SurgeryPlan, folder: Path, target: Path, manifest: Mapping[str, Any], progress: Progress | None
) -> None:
    """Writes all files of a pruned checkpoint.

    Args:
        plan: The surgery plan.
        folder: The empty folder to write into.
        target: The later path of ``folder``, into which local paths in JSON files will point.
        manifest: The content of clp.json.
        progress: Called with the bytes copied so far and the bytes to copy.

    Raises:
        ClpError: A file of the source changed meanwhile, or a JSON file of the source cannot be rewritten.
        OSError: Reading or writing fails.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.nbytes)

    _write_weights(plan, folder / WEIGHTS_FILE, advance)
    for name in plan.copied_files():
        copied = folder / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(plan.checkpoint.path / name, copied, advance)
    family = plan.checkpoint.family
    configs = {CONFIG_FILE: copy.deepcopy(plan.config)}
    try:
        rewrite_json(folder, lambda documents: family.rewrite_local_paths(documents, target.resolve(), folder))
        family.rewrite_local_paths(configs, target.resolve(), folder)
    except (TypeError, AttributeError, LookupError) as error:
        raise ClpError(
            f"a JSON file is not built as {family.name} checkpoints are ({type(error).__name__}: {error})",
            where=plan.checkpoint.path,
            hint="save the checkpoint again with lerobot",
        ) from error
    _write_json(folder / MANIFEST_FILE, manifest)
    # Written last, so that an incomplete folder is not a checkpoint.
    _write_json(folder / CONFIG_FILE, configs[CONFIG_FILE])


def _write_weights(plan: SurgeryPlan, path: Path, advance: Callable[[int], None]) -> None:
    checkpoint = plan.checkpoint
    with ExitStack() as stack:
        opened = {name: stack.enter_context((checkpoint.path / name).open("rb")) for name in checkpoint.weight_files}
        target = stack.enter_context(path.open("wb", buffering=0))
        reserve(target.fileno(), len(plan.header) + sum(tensor.nbytes for tensor in plan.tensors.values()))
        target.write(plan.header)
        advance(len(plan.header))
        copier = RangeCopier(target.fileno(), advance)
        for name, start, end, cut in plan.pieces():
            if cut is None:
                copier.append(opened[name].fileno(), start, end, checkpoint.path / name)
            else:
                copier.append_slice(opened[name].fileno(), start, cut, checkpoint.path / name)
        for name, file in opened.items():
            checkpoint.check_unchanged(name, file.fileno())


def _copy_file(source: Path, target: Path, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        RangeCopier(writer.fileno(), advance).append(reader.fileno(), 0, os.fstat(reader.fileno()).st_size, source)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
