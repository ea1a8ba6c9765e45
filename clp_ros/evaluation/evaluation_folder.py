# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: what is played, and the outcomes so far, so that an interrupted evaluation goes on.

``plan.json`` says what all checkpoints have in common. ``policies/<fingerprint>/`` has one checkpoint's
``policy.json``, and a file for each block of episodes that is done. Each file is written under a temporary name first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.files import check_output_folder
from clp_ros.core.json_object import read_json_object
from clp_ros.evaluation.outcome import EpisodeOutcome

PLAN_FILE, RESULT_FILE, PICTURES = "plan.json", "evaluation.json", "pictures"
_POLICIES, _POLICY_FILE = "policies", "policy.json"


class EvaluationFolder:
    """Reads and writes the folder of an evaluation.

    Args:
        path: The folder.
        plan: What is played, as JSON. A folder with another plan is refused.
        overwrite: Whether a folder that is not empty is emptied first.

    Raises:
        ClpError: The folder has another plan, or is not empty and not an evaluation's.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        if overwrite:
            check_output_folder(path, overwrite=True)
            if path.is_dir():
                shutil.rmtree(path)
        if (path / PLAN_FILE).is_file():
            self._check_plan(plan)
        else:
            check_output_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / PLAN_FILE, plan)

    def _check_plan(self, plan: Mapping[str, Any]) -> None:
        had = read_json_object(self.path / PLAN_FILE)
        wanted = json.loads(json.dumps(plan))
        different = [key for key in {**had, **wanted} if had.get(key) != wanted.get(key)]
        if different:
            key = different[0]
            values = f": {had.get(key)!r} there, {wanted.get(key)!r} here"
            raise ClpError(
                f"the folder has another evaluation, whose {key} differs{values if len(values) < 120 else ''}",
                where=self.path,
                hint="give another --output, the same options as before, or --overwrite",
            )

    def policy(self, fingerprint: str) -> dict[str, Any] | None:
        """Returns what was written by :meth:`add_policy`; None before."""
        file = self._folder(fingerprint) / _POLICY_FILE
        return read_json_object(file) if file.is_file() else None

    def add_policy(self, fingerprint: str, facts: Mapping[str, Any]) -> None:
        """Writes facts of a checkpoint: its path and latency."""
        write_json(self._folder(fingerprint) / _POLICY_FILE, facts)

    def block(self, fingerprint: str, task: str, seeds: Sequence[int]) -> tuple[list[EpisodeOutcome], dict] | None:
        """Returns the outcomes of a block and where the time went; None if it was not played with these seeds."""
        file = self._block_file(fingerprint, task, seeds)
        if not file.is_file():
            return None
        document = read_json_object(file)
        outcomes = [EpisodeOutcome.model_validate(one) for one in document["outcomes"]]
        return (outcomes, document["seconds"]) if [one.seed for one in outcomes] == list(seeds) else None

    def add_block(
        self,
        fingerprint: str,
        task: str,
        outcomes: Sequence[EpisodeOutcome],
        seconds: Mapping[str, float],
        pictures: Mapping[int, Sequence[np.ndarray]],
    ) -> None:
        """Writes a block that was played, its pictures first."""
        for seed, taken in pictures.items():
            _write_pictures(self.picture_file(fingerprint, task, seed), taken)
        document = {"outcomes": [one.model_dump(mode="json") for one in outcomes], "seconds": dict(seconds)}
        write_json(self._block_file(fingerprint, task, [one.seed for one in outcomes]), document)

    def picture_file(self, fingerprint: str, task: str, seed: int) -> Path:
        """Returns the file of an episode's pictures, side by side."""
        return self._folder(fingerprint) / PICTURES / f"{task}_{seed}.png"

    def _folder(self, fingerprint: str) -> Path:
        return self.path / _POLICIES / fingerprint[:16]

    def _block_file(self, fingerprint: str, task: str, seeds: Sequence[int]) -> Path:
        return self._folder(fingerprint) / f"{task}_{seeds[0]}.json"


def write_json(file: Path, document: Any) -> None:
    """Writes a JSON file under a temporary name, which is then changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def _write_pictures(file: Path, taken: Sequence[np.ndarray]) -> None:
    import cv2

    file.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(file), np.concatenate(taken, axis=1)[..., ::-1]):
        raise ClpError("the picture cannot be written", where=file, hint="free some disk space")
