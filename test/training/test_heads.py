# SPDX-License-Identifier: Apache-2.0
"""Task heads: apart and back, byte for byte, and exchanged in a loaded base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_tools import CAMERA, PUSHT, SIDE, TASK
from safetensors.torch import load_file, save_file

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families
from clp_ros.training.task_heads import TaskHeads, load_task_heads

PUSH, PULL = TASK, "Pull the block away."
EXPERT = "model.vlm_with_expert.lm_expert.layers."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "base"
    folder.mkdir()
    with quiet():
        families()["smolvla"].make_checkpoint("tiny", folder, folder, PUSHT, 0)
    return folder


@pytest.fixture(scope="module")
def finetuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``finetuned(seed)``: the base with other values in some tensors and in the statistics."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            folder = made[seed] = tmp_path_factory.mktemp("tuned") / str(seed)
            shutil.copytree(base, folder)
            random = torch.Generator().manual_seed(seed)
            weights = load_file(base / "model.safetensors")
            names = [name for name in weights if name.startswith((f"{EXPERT}{13 + seed}.", "model.action_out_proj."))]
            assert len(names) > 3
            for name in names:
                noise = torch.randn(weights[name].shape, generator=random).to(weights[name].dtype)
                weights[name] = weights[name] + 0.1 * noise
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            (statistics,) = folder.glob("*unnormalizer*.safetensors")
            values = load_file(statistics)
            save_file({name: value + seed for name, value in values.items()}, statistics)
        return made[seed]

    return make


@pytest.fixture(scope="module")
def head(
    base: Path, finetuned: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp("head") / str(seed)
            folders = ("--base", base, "--finetuned", finetuned(seed), "--output", made[seed])
            assert main(["head", "extract", *map(str, folders)]) == 0
        return made[seed]

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_head_is_small_and_gives_the_checkpoint_back_byte_for_byte(
    base: Path,
    finetuned: Callable[[int], Path],
    head: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = load_file(head(1) / "head.safetensors")
    before, after = (load_file(one / "model.safetensors") for one in (base, finetuned(1)))
    assert held.keys() == {name for name in after if not torch.equal(before[name], after[name])}
    assert (head(1) / "head.safetensors").stat().st_size < 0.2 * (base / "model.safetensors").stat().st_size

    capsys.readouterr()
    folders = ("--base", base, "--head", head(1), "--output", tmp_path / "again")
    assert main(["head", "apply", *map(str, folders), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == sum(tensor.numel() for tensor in held.values())
    again, expected = contents(tmp_path / "again"), contents(finetuned(1))
    assert again.keys() == expected.keys()
    for name, data in expected.items():
        if name.endswith(".json"):  # which have the folder's own path
            moved = again[name].replace(str(tmp_path / "again").encode(), str(base).encode())
            assert json.loads(moved) == json.loads(data), name
        else:
            assert again[name] == data, name


def test_a_head_of_another_base_is_refused(
    finetuned: Callable[[int], Path], head: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ("--base", finetuned(2), "--head", head(1), "--output", tmp_path / "out")
    assert main(["head", "apply", *map(str, folders)]) == 1
    assert "the head belongs to another base" in capsys.readouterr().err
    policy = load_policy(finetuned(2), "cpu")
    with pytest.raises(ClpError, match="the head belongs to another base"):
        load_task_heads(policy, {PUSH: head(1)}, PUSH)
    assert not (tmp_path / "out").exists()


def test_a_changed_head_is_refused(base: Path, head: Callable[[int], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(head(1), tmp_path / "head")
    data = bytearray((copy / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "head.safetensors").write_bytes(data)
    with pytest.raises(ClpError, match="one of them has changed"):
        from clp_ros.training.heads import apply_head

        apply_head(base, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def chunk(policy: LeRobotPolicy, task: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((1, policy.chunk_size, policy.policy.config.max_action_dim)))
    picture = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return policy.predict_chunk({CAMERA: picture}, np.array([200.0, 300.0], np.float32), task, noise=noise.float())


def test_heads_are_exchanged_by_the_task_and_act_as_the_whole_checkpoints(
    base: Path, finetuned: Callable[[int], Path], head: Callable[[int], Path]
) -> None:
    expected = {task: chunk(load_policy(finetuned(seed), "cpu"), task) for task, seed in ((PUSH, 1), (PULL, 2))}
    assert not np.array_equal(expected[PUSH], expected[PULL])
    policy = load_task_heads(load_policy(base, "cpu"), {PUSH: head(1), PULL: head(2)}, PUSH)
    assert isinstance(policy, TaskHeads)
    for task in (PUSH, PULL, PULL, PUSH, PULL):
        np.testing.assert_array_equal(chunk(policy, task), expected[task])
    with pytest.raises(ClpError, match="no head is for the task"):
        chunk(policy, "Fold the shirt.")
    np.testing.assert_array_equal(chunk(policy, PULL), expected[PULL])
