# SPDX-License-Identifier: Apache-2.0
"""Stock lerobot's own commands take a pruned checkpoint of every family as one of theirs: lerobot-train, lerobot-eval.

They run as processes of their own, without clp_ros: what they load besides lerobot is what they find installed.
"""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_processes

from clp_ros.errors import ClpError
from clp_ros.files import rewrite_json
from clp_ros.pruning.surgery import prune_checkpoint
from clp_ros.vla.checkpoint import Checkpoint
from clp_ros.vla.family import check_lerobot, families
from clp_ros.vla.features import PolicyFeatures
from clp_ros.vla.policy import LoadedPolicy, load_policy, quiet

CAMERA = "observation.image"
TASK = "Push the T-shaped block onto the target."
SIDE = 96
# gym-pusht's: a camera, and the position of the pusher on a board of 512 by 512.
PUSHT = PolicyFeatures(
    cameras={CAMERA: (SIDE, SIDE)},
    state_size=2,
    action_size=2,
    state_mean=(256.0,) * 2,
    state_std=(100.0,) * 2,
    action_mean=(256.0,) * 2,
    action_std=(100.0,) * 2,
)
STEPS = 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobotDataset of two episodes of 90 frames: a dot on its way round, and where it is next as the action."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("datasets") / "dots"
    features = {
        CAMERA: {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channel"]},
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    with quiet():
        written = LeRobotDataset.create("clp_ros/dots", fps=10, features=features, root=root, use_videos=False)
        for start in (0.0, 2.0):
            angles = start + np.linspace(0.0, 9.0, 91)
            places = (256 + 150 * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)
            for place, following in itertools.pairwise(places):
                picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
                row, column = (place[::-1] * SIDE / 512).astype(int)
                picture[row - 4 : row + 4, column - 4 : column + 4] = 255
                written.add_frame({CAMERA: picture, "observation.state": place, "action": following, "task": TASK})
            written.save_episode()
        written.finalize()
    return root


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``pruned(family)``: its tiny checkpoint for PushT, without the first layers that may go of each module."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        family = families()[name]
        try:
            check_lerobot(family)
        except ClpError as error:
            pytest.skip(str(error))
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base = folder / "base"
            base.mkdir()
            with quiet():
                family.make_checkpoint("tiny", base, base, PUSHT, 0)
            removal = {}
            for module in Checkpoint.open(base).modules:
                first = 1 + max(module.fixed, default=0)
                removal[module.name] = tuple(range(first, first + max(2, module.period)))
            prune_checkpoint(base, folder / "pruned", removal)
            rewrite_json(folder / "pruned", fast)
            made[name] = folder / "pruned"
        return made[name]

    return checkpoint


def fast(documents: Mapping[str, dict[str, Any]]) -> None:
    """Sets a learning rate at which random weights move in 20 steps, from the first one on."""
    config = documents["config.json"]
    assert "optimizer_lr" in config
    config["optimizer_lr"] = 1e-3
    if "warmup_ratio" in config:
        config["warmup_ratio"] = 0.0


def training_batch(policy: LoadedPolicy, dataset: Path) -> dict[str, Any]:
    """Frames of the dataset through a policy's preprocessor, as lerobot-train has them."""
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    meta = LeRobotDataset("clp_ros/dots", root=dataset).meta
    chunks = resolve_delta_timestamps(policy.policy.config, meta)
    frames = LeRobotDataset("clp_ros/dots", root=dataset, delta_timestamps=chunks)
    return policy.preprocessor(torch.utils.data.default_collate([frames[index] for index in range(0, len(frames), 6)]))


def training_loss(policy: LoadedPolicy, batch: dict[str, Any]) -> float:
    torch.manual_seed(0)  # the flow's noise and time
    with torch.no_grad():
        return policy.policy.forward(dict(batch))[0].item()


def lerobot(command: str, folder: Path, *arguments: str) -> str:
    """Runs a command of the installed lerobot, offline, and returns what it logged."""
    # What is on the path by PYTHONPATH is not installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "SDL_VIDEODRIVER": "dummy"}
    program = str(Path(sys.executable).with_name(command))
    done = warm_processes.run([program, *arguments], env, folder)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return log


@pytest.mark.parametrize("name", families())
def test_lerobot_train_fine_tunes_a_pruned_checkpoint(
    name: str, pruned: Callable[[str], Path], dataset: Path, tmp_path: Path
) -> None:
    start = pruned(name)
    log = lerobot(
        "lerobot-train",
        tmp_path,
        f"--policy.path={start}",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=clp_ros/dots",
        f"--dataset.root={dataset}",
        f"--output_dir={tmp_path / 'run'}",
        f"--steps={STEPS}",
        "--batch_size=8",
        "--num_workers=0",
        "--log_freq=1",
    )
    losses = [float(loss) for loss in re.findall(r"step:\d+ .* loss:(\S+)", log)]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)

    trained = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert Checkpoint.open(trained).layers == Checkpoint.open(start).layers
    policy = load_policy(trained, "cpu")
    assert policy.family.name == name
    # What is logged is of other frames, other noise and other times at every step; these are the same for both.
    batch = training_batch(policy, dataset)
    assert training_loss(policy, batch) < training_loss(load_policy(start, "cpu"), batch)
    picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    chunk = policy.predict_chunk({CAMERA: picture}, np.array([200.0, 300.0], dtype=np.float32), TASK)
    assert chunk.shape == (policy.chunk_size, 2)
    assert np.isfinite(chunk).all()


@pytest.mark.parametrize("name", families())
def test_lerobot_eval_runs_a_pruned_checkpoint(name: str, pruned: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht", reason="no gym-pusht (requirements-no-deps.txt)")
    lerobot(
        "lerobot-eval",
        tmp_path,
        f"--policy.path={pruned(name)}",
        "--env.type=pusht",
        "--env.episode_length=10",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'run'}",
    )
    result = json.loads((tmp_path / "run" / "eval_info.json").read_text())
    assert math.isfinite(result["overall"]["avg_sum_reward"])
    assert result["overall"]["n_episodes"] == 1
