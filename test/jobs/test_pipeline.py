# SPDX-License-Identifier: Apache-2.0
"""The pipeline: bags and a checkpoint become a fine-tuned pruned checkpoint, at one go or with an interruption."""

import json
from pathlib import Path

import pytest

from clp_ros.core.errors import ClpError
from clp_ros.jobs.pipeline import PipelineRequest, run
from clp_ros.jobs.progress import Progress


class Interrupted(Exception):
    pass


class Until(Progress):
    """Notes the stages, and interrupts the pipeline when a stage of a given step begins."""

    def __init__(self, step: str | None = None) -> None:
        self.stages: list[str] = []
        self._step = step

    def stage(self, title: str, unit: str = "") -> None:
        self.stages.append(title)
        if self._step is not None and f" {self._step}: " in title:
            raise Interrupted


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path, recording: Path) -> dict:
    return {
        "bags": [recording],
        "checkpoint": tiny_checkpoint,
        "embodiment": "aloha_bimanual",
        "task": "transfer_cube",
        "samples": 2,
        "steps": 2,
        "batch_size": 1,
        "device": "cpu",
    }


def test_an_interrupted_pipeline_continues_with_the_step_that_was_not_finished(arguments: dict, tmp_path: Path) -> None:
    request = PipelineRequest(**arguments, output=tmp_path / "out")
    with pytest.raises(Interrupted):
        run(request, Until("prune"))
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert list(state["steps"]) == ["convert", "calibrate"]

    with pytest.raises(ClpError, match="run with other arguments: steps = 2"):
        run(PipelineRequest(**arguments | {"steps": 3}, output=tmp_path / "out"))

    seen = Until()
    result = run(request, seen)
    assert result.skipped == ("convert", "calibrate")
    assert seen.stages[0].startswith("3/5 prune: ")
    assert list(result.steps) == ["convert", "calibrate", "prune", "finetune", "verify"]
    verified = result.steps["verify"]
    assert verified["pruned"]
    assert verified["path"] == str(result.checkpoint)
    assert result.steps["prune"]["removed"]["vlm"]
    assert verified["layers"]["vlm"] == result.steps["prune"]["layers"]["vlm"]
    assert result.steps["finetune"]["steps"] == 2

    again = run(request)
    assert len(again.skipped) == 5
    assert again.steps == result.steps


def test_a_bag_that_cannot_be_converted_ends_the_pipeline(arguments: dict, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = PipelineRequest(**arguments | {"bags": [*arguments["bags"], tmp_path / "empty"]}, output=tmp_path / "out")
    with pytest.raises(ClpError, match=r"(?s)empty.*cannot be used.*run again without it"):
        run(request)
    assert not (tmp_path / "out" / "pipeline.json").exists()


def test_a_folder_with_other_content_is_refused(arguments: dict, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClpError, match=r"not empty, and without pipeline.json \(hint: give another output\)"):
        run(PipelineRequest(**arguments, output=tmp_path))
