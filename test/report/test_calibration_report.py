# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import cv2
import numpy as np
import pytest

from clp_ros.calibration.calibration_file import Calibration
from clp_ros.core.errors import ClpError
from clp_ros.pruning.selection import blocks, calibrated_threshold, group_scores, select_layers
from clp_ros.report.calibration_report import write_calibration

MODULES = ("vlm", "expert")


def measured(kind: type[Calibration] = Calibration, num_layers: int = 8) -> Calibration:
    rng = np.random.default_rng(0)
    modules = {
        name: {"layers": num_layers, "group": "backbone", "period": 2, "dead_last": name == "vlm"} for name in MODULES
    }
    return kind(
        meta={
            "checkpoint": {"path": "base", "fingerprint": "0"},
            "family": "smolvla",
            "samples": 64,
            "modules": modules,
        },
        matrices={name: rng.uniform(0.5, 1, (num_layers, num_layers)) for name in MODULES},
        mse={name: rng.random(num_layers - 1) for name in MODULES},
        cosine={name: rng.random(num_layers - 1) for name in MODULES},
    )


def coupled_plan(calibration: Calibration, budget: int) -> dict:
    scores = group_scores(calibration.adjacent, last_output_unused={"vlm"})
    threshold = calibrated_threshold(scores, budget, period=2)
    removed = select_layers(scores, budget, threshold, period=2)
    module = {"threshold": threshold, "blocks": blocks(scores, threshold), "removed": removed, "scores": scores}
    return dict.fromkeys(calibration.matrices, module)


def test_folder_holds_the_numbers_a_heatmap_a_module_and_the_page(tmp_path):
    calibration = measured()
    plan = coupled_plan(calibration, 4)
    output = write_calibration(calibration, tmp_path / "out", plan, command="clp prune --budget vlm=4")
    assert output == tmp_path / "out"
    names = {"calibration.json", "cka.npz", "heatmap_vlm.png", "heatmap_expert.png", "report.html"}
    assert {path.name for path in output.iterdir()} == names
    pictures = [cv2.imread(str(output / f"heatmap_{name}.png")) for name in ("vlm", "expert")]
    assert not np.array_equal(*pictures)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "clp prune --budget vlm=4" in page
    assert "It loses the same layers as expert" in page
    np.testing.assert_array_equal(Calibration.load(output).matrices["vlm"], calibration.matrices["vlm"])
    assert page.count(f"<strong>{', '.join(map(str, plan['vlm']['removed']))}</strong>") == 2


def test_again_gives_the_same_bytes(tmp_path):
    calibration = measured()
    for name in ("a", "b"):
        write_calibration(calibration, tmp_path / name, coupled_plan(calibration, 4))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_module_without_a_plan_is_shown_without(tmp_path):
    write_calibration(measured(), tmp_path / "out", {"expert": {"removed": (3,)}})
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("None of the 8 layers would be removed") == 1


def test_a_filled_folder_is_kept_unless_overwriting(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(ClpError, match="not empty"):
        write_calibration(measured(), output, {})
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    write_calibration(measured(), output, {}, overwrite=True)
    assert not (output / "mine.txt").exists()
    assert (output / "report.html").exists()


@pytest.mark.parametrize(
    ("fault", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("disk full"), ClpError)]
)
def test_a_broken_run_leaves_nothing_behind(tmp_path, fault, expected):
    class Broken(Calibration):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise fault

    with pytest.raises(expected, match="disk full" if expected is ClpError else None):
        write_calibration(measured(Broken), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_plan_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="layer 8"):
        write_calibration(measured(), tmp_path / "out", {"vlm": {"removed": (8,)}})
    with pytest.raises(ValueError, match="not calibrated: dit"):
        write_calibration(measured(), tmp_path / "out", {"dit": {}})
    assert list(tmp_path.iterdir()) == []
