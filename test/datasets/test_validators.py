# SPDX-License-Identifier: Apache-2.0
"""Programs that others wrote find nothing wrong with a converted dataset, and LeRobot trains on it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import bag_tools
import numpy as np
import pytest
import yaml
from robot_tools import EYE, MS, START, STATES, document, recorded_states, sync

from clp_ros.jobs import convert

EPISODES, FRAMES = 20, 102


def recording(seed: int) -> list[tuple[str, Any, int]]:
    """A smooth movement of all joints that follows a picture, another one for each seed."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, 3), rng.uniform(2.5, 3.5, 3)
    background = np.kron(rng.integers(40, 200, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    messages = []
    for step in range(FRAMES + 1):
        stamp, angle = START + step * 20 * MS, phase + speed * step / 50
        waist, elbow, finger = np.sin(angle) * (1, 0.8, 0.015) + (0, 0, 0.04)
        messages.append((STATES, recorded_states(stamp, waist, elbow, finger), stamp))
        rows = background.copy()
        left = int(40 + 30 * waist)
        rows[20:44, left : left + 16] = (230, 60, 40)
        messages.append((EYE, bag_tools.image(rows, "rgb8", stamp_ns=stamp), stamp))
    return messages


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    bags = [bag_tools.write_bag(folder / f"bag_{seed:02}", recording(seed)) for seed in range(EPISODES)]
    (folder / "robot.yaml").write_text(yaml.safe_dump(document(sync("asof", 60), sync("asof", 60)), sort_keys=False))
    result = convert.run(
        convert.ConvertRequest(
            bags=tuple(bags), embodiment=folder / "robot.yaml", output=folder / "dataset", task="follow the block"
        )
    )
    assert (result.episodes, result.frames, result.left_out) == (EPISODES, EPISODES * FRAMES, [])
    return result.output


def typer_output(app: Any, *arguments: str) -> tuple[int, str]:
    from typer.testing import CliRunner

    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.output


def test_lerobot_doctor(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = pytest.importorskip("lerobot_doctor.cli", reason="requirements-dev.txt")
    try:
        code = cli.main(["check", str(dataset)])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert not code, printed
    assert "Summary: 11 PASS" in printed, printed


def test_lerobot_lint(dataset: Path) -> None:
    cli = pytest.importorskip("lerobot_lint.cli", reason="requirements-dev.txt")
    # Two infos, that 20 episodes are few and how it takes the units, make the exit code 1.
    code, printed = typer_output(cli.app, "check", str(dataset))
    assert code <= 1, printed
    assert "Summary: 0 errors, 0 warnings, 2 info" in printed


def test_robovet(dataset: Path) -> None:
    cli = pytest.importorskip("robovet.cli", reason="requirements-dev.txt")
    code, printed = typer_output(cli.app, "doctor", str(dataset))
    assert code == 0, printed
    assert "0 fail · 0 warn" in printed


def test_rdq(dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli = pytest.importorskip("rdq.cli", reason="requirements-dev.txt")
    monkeypatch.setattr(sys, "argv", ["rdq", "check", str(dataset)])
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert not code, printed
    assert f"usable episodes {EPISODES}/{EPISODES}" in printed
    assert "ERROR" not in printed
    assert "WARN" not in printed


@pytest.mark.slow
def test_lerobot_train_trains_on_it(dataset: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lerobot-train")), "--policy.type=act", "--policy.device=cpu"]
    command += ["--dataset.repo_id=test/dataset", f"--dataset.root={dataset}", "--policy.push_to_hub=false"]
    command += ["--policy.dim_model=32", "--policy.n_heads=2", "--policy.dim_feedforward=32", "--policy.chunk_size=8"]
    command += ["--policy.n_action_steps=8", "--policy.pretrained_backbone_weights=null", "--num_workers=0"]
    command += ["--steps=3", "--batch_size=2", "--log_freq=1", f"--output_dir={tmp_path / 'trained'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "trained").glob("checkpoints/*/pretrained_model/model.safetensors"))
