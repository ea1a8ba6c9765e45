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
import published
import pytest
import torch
import warm_processes
import yaml
from dataset_tools import CAMERA, PUSHT, SIDE, TASK, write_dots

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.core.resources import resource_path
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import check_lerobot
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families
from clp_ros.pruning.surgery import prune_checkpoint
from clp_ros.robots.embodiment import load_embodiment

# Steps and batch size in which the loss falls, at the learning rate below. That of GR00T N1.5 rises first.
STEPS, BATCH = 8, 4
LONGER = {"groot": (20, 8)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("datasets") / "dots", 90)


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
            for module in Checkpoint.open(base).layer_stacks:
                first = 1 + max(module.protected_layers, default=0)
                removal[module.name] = tuple(range(first, first + max(2, module.pattern_period)))
            prune_checkpoint(base, folder / "pruned", removal)
            rewrite_json(folder / "pruned", fast)
            made[name] = folder / "pruned"
        return made[name]

    return checkpoint


def fast(documents: Mapping[str, dict[str, Any]]) -> None:
    """Sets a learning rate at which random weights move in a few steps, from the first one on."""
    config = documents["config.json"]
    assert "optimizer_lr" in config
    config["optimizer_lr"] = 1e-3
    if "warmup_ratio" in config:
        config["warmup_ratio"] = 0.0


def training_batch(policy: LeRobotPolicy, dataset: Path) -> dict[str, Any]:
    """Frames of the dataset through a policy's preprocessor, as lerobot-train has them."""
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    meta = LeRobotDataset("clp_ros/dots", root=dataset).meta
    chunks = resolve_delta_timestamps(policy.policy.config, meta)
    frames = LeRobotDataset("clp_ros/dots", root=dataset, delta_timestamps=chunks)
    return policy.preprocessor(torch.utils.data.default_collate([frames[index] for index in range(0, len(frames), 6)]))


def training_loss(policy: LeRobotPolicy, batch: dict[str, Any]) -> float:
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
    steps, batch_size = LONGER.get(name, (STEPS, BATCH))
    log = lerobot(
        "lerobot-train",
        tmp_path,
        f"--policy.path={start}",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=clp_ros/dots",
        f"--dataset.root={dataset}",
        f"--output_dir={tmp_path / 'run'}",
        f"--steps={steps}",
        f"--batch_size={batch_size}",
        "--num_workers=0",
        "--log_freq=1",
    )
    losses = [float(loss) for loss in re.findall(r"step:\d+ .* loss:(\S+)", log)]
    assert len(losses) == steps
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


@pytest.fixture(scope="module")
def seven_joints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobotDataset of a robot of seven joints and two cameras, under names of its own."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("datasets") / "seven"
    cameras = ("observation.images.top", "observation.images.wrist")
    features = {
        camera: {"dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channel"]} for camera in cameras
    }
    names = [f"joint_{number}" for number in range(7)]
    features |= {key: {"dtype": "float32", "shape": (7,), "names": names} for key in ("observation.state", "action")}
    rng = np.random.default_rng(0)
    with quiet():
        written = LeRobotDataset.create("clp_ros/seven", fps=50, features=features, root=root, use_videos=False)
        for _ in range(2):
            for positions, following in itertools.pairwise(rng.uniform(-3, 3, (21, 7)).astype(np.float32)):
                pictures = {camera: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for camera in cameras}
                written.add_frame(pictures | {"observation.state": positions, "action": following, "task": TASK})
            written.save_episode()
        written.finalize()
    return root


@pytest.mark.usefixtures("warm_workers")
def test_a_pruned_base_model_fine_tuned_for_another_robot_serves_every_command(
    seven_joints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lerobot-train keeps the base's input_features: a state of 6 and three cameras, with statistics of 7 and two."""
    base, start = published.smolvla_base(tmp_path / "base"), tmp_path / "start"
    assert main(["prune", "--checkpoint", str(base), "--remove", "vlm=1,2,3,4", "--output", str(start)]) == 0
    top, wrist, cameras = (f"observation.images.{name}" for name in ("top", "wrist", "camera"))
    rename_map = {top: f"{cameras}2", wrist: f"{cameras}1"}
    lerobot(
        "lerobot-train",
        tmp_path,
        f"--policy.path={start}",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=clp_ros/seven",
        f"--dataset.root={seven_joints}",
        f"--rename_map={json.dumps(rename_map)}",
        f"--output_dir={tmp_path / 'run'}",
        "--steps=2",
        "--batch_size=2",
        "--num_workers=0",
    )
    trained = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    config = json.loads((trained / "config.json").read_text())
    assert len(config["input_features"]) == 4
    assert config["input_features"]["observation.state"]["shape"] == [6]
    assert config["output_features"]["action"]["shape"] == [7]

    check_against_stock(trained, rename_map)

    robot = yaml.safe_load(resource_path("config/embodiments/ur5.yaml").read_text())
    for camera, number in zip(robot["cameras"].values(), (1, 2), strict=True):
        camera["feature"] = f"{cameras}{number}"
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot, sort_keys=False))
    assert len(load_embodiment(str(tmp_path / "robot.yaml")).joints) == 7

    def clp(*arguments: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0, arguments
        return json.loads(capsys.readouterr().out)

    assert clp("inspect", trained)["family"] == "smolvla"
    calibrated = clp(
        *("calibrate", "--checkpoint", trained, "--bag", resource_path("rosbags/ur5"), "--task", TASK),
        *("--embodiment", tmp_path / "robot.yaml", "--samples", 2, "--output", tmp_path / "calibration"),
    )
    assert calibrated["left_out_cameras"] == [f"{cameras}3"]
    assert calibrated["statistics"] == {"source": "checkpoint"}
    pruned = tmp_path / "pruned"
    files = ("--checkpoint", trained, "--calibration", tmp_path / "calibration", "--output", pruned)
    assert clp("prune", *files, "--budget", "vlm=4")["layers"] == {"vlm": 8, "expert": 8}
    for one in (trained, pruned):
        verified = clp("verify", one)
        assert verified["chunk"] == [50, 7]
        assert verified["cameras"] == [f"{cameras}1", f"{cameras}2"]
        assert verified["left_out_cameras"] == [f"{cameras}3"]
        assert verified["raw_features"] == []
    check_against_stock(pruned, rename_map)
    measured = clp("benchmark", trained, pruned, "--runs", 1, "--warmup", 0, "--device", "cpu")["checkpoints"]
    assert measured[0]["gflops"] > measured[1]["gflops"] > 0
    assert all(one["train_step_ms"] > 0 for one in measured)


def check_against_stock(checkpoint: Path, rename_map: Mapping[str, str]) -> None:
    """Stock lerobot's processors and policy give the same actions, bit for bit, given the dataset's own names."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    rng = np.random.default_rng(1)
    images = {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in rename_map}
    state = rng.uniform(-3, 3, 7).astype(np.float32)
    noise = torch.from_numpy(rng.standard_normal((1, 50, 32), dtype=np.float32))
    with quiet():
        config = PreTrainedConfig.from_pretrained(checkpoint)
        stock = get_policy_class(config.type).from_pretrained(checkpoint, config=config, strict=True)
        before, after = make_pre_post_processors(stock.config, pretrained_path=str(checkpoint))
    pixels = {name: torch.from_numpy(image).permute(2, 0, 1).float() / 255 for name, image in images.items()}
    observation = {**pixels, "observation.state": torch.from_numpy(state), "task": TASK}
    with torch.inference_mode():
        expected = after(stock.predict_action_chunk(before(observation), noise=noise))[0].numpy()

    policy = load_policy(checkpoint, "cpu")
    assert len(policy.check_features(list(rename_map.values()), 7, "my robot")) == 1
    mine = {new: images[old] for old, new in rename_map.items()}
    np.testing.assert_array_equal(policy.predict_chunk(mine, state, TASK, noise=noise), expected)
