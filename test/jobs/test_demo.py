# SPDX-License-Identifier: Apache-2.0
"""The demo, as `make demo` runs it: every step, the policy node over DDS among them."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object]:
    output = tmp_path_factory.mktemp("demo") / "out put"  # paths with a space work too
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "clp_ros.cli", "demo", "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, output


def test_every_step_says_what_it_did(demo):
    printed, output = demo
    for number in range(1, 7):
        assert f"{number}. " in printed
    assert "stock lerobot loads it strictly" in printed
    commands = [line.split()[2] for line in printed.splitlines() if line.startswith("$ clp ")]
    assert commands == ["make-checkpoint", "calibrate", "prune", "verify", "benchmark"]
    for measure in ("parameters", "GFLOPs", "latency"):
        assert measure in printed
    assert f"{output}/calibration/heatmap_vlm.png" in printed.replace("\n", "")


def test_trajectories_came_out_of_the_policy_node(demo):
    pytest.importorskip("rclpy", reason="ROS 2 is not there; the demo skips its drive")
    printed, _ = demo
    for controller in ("left_arm", "left_gripper", "right_arm", "right_gripper"):
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{controller}:"))
        trajectories, points = (int(word) for word in line.split() if word.isdigit())
        assert trajectories > 0
        assert points > 10  # a chunk, not only stops


def test_what_it_leaves_is_what_the_steps_promise(demo):
    _, output = demo
    base, pruned = (json.loads((output / name / "config.json").read_text()) for name in ("base", "pruned"))
    assert (base["num_vlm_layers"], pruned["num_vlm_layers"]) == (16, 10)
    assert (output / "calibration" / "report.html").stat().st_size > 10_000
    assert (output / "calibration" / "heatmap_expert.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["base", "calibration", "pruned"]
