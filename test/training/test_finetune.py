# SPDX-License-Identifier: Apache-2.0
"""``clp finetune`` on a small SmolVLA: which weights change, resuming after a kill, and what it refuses."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_processes
from dataset_tools import CAMERA, PUSHT, SIDE, TASK, write_dots
from safetensors.numpy import load_file

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.jobs.finetune import FinetuneRequest, run
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families
from clp_ros.pruning.surgery import prune_checkpoint
from clp_ros.training.lerobot_train import supports_exact_resume
from clp_ros.training.run_folder import RunFolder
from clp_ros.training.trainable import parse_trainable

STEPS = 6
OUTPUT_PROJECTION = "model.action_out_proj."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("datasets") / "dots", 20, episodes=3)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned SmolVLA, with a learning rate at which a few steps change every trained weight."""
    folder = tmp_path_factory.mktemp("smolvla")
    base = folder / "base"
    base.mkdir()
    with quiet():
        families()["smolvla"].make_checkpoint("tiny", base, base, PUSHT, 0)
    prune_checkpoint(base, folder / "pruned", {"vlm": (1, 2), "expert": (1, 2)})

    def fast(documents: Any) -> None:
        documents["config.json"]["optimizer_lr"] = 1e-3

    rewrite_json(folder / "pruned", fast)
    return folder / "pruned"


@pytest.fixture
def request_of(pruned: Path, dataset: Path, tmp_path: Path) -> Callable[..., FinetuneRequest]:
    def make(**values: Any) -> FinetuneRequest:
        given = {"checkpoint": pruned, "dataset": dataset, "output": tmp_path / "tuned", "steps": STEPS}
        return FinetuneRequest(**(given | {"batch_size": 2, "workers": 0, "device": "cpu"} | values))

    return make


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if old[name].tobytes() != new[name].tobytes()}


def test_the_last_layers_and_the_output_projections_change_and_nothing_else(
    pruned: Path, request_of: Callable[..., FinetuneRequest]
) -> None:
    result = run(request_of(train="last=2"))
    tuned = Path(result.output)
    stacks = {stack.name: stack for stack in Checkpoint.open(pruned).layer_stacks}
    allowed = {
        name: stack.layer_prefix.format(layer=layer)
        for stack in stacks.values()
        for layer in range(stack.layers - 2, stack.layers)
        for name in weights(pruned)
        if name.startswith(stack.layer_prefix.format(layer=layer))
    }
    found = changed(pruned, tuned)
    inside = {name for name in found if not name.startswith(OUTPUT_PROJECTION)}
    assert inside <= allowed.keys()
    # Each of these layers has changed.
    vlm, expert = stacks["vlm"], stacks["expert"]
    moved = {allowed[name] for name in inside}
    last = {stack.layer_prefix.format(layer=stack.layers - 1) for stack in (vlm, expert)}
    assert moved | last == {stack.layer_prefix.format(layer=stack.layers - 2) for stack in (vlm, expert)} | last
    assert expert.layer_prefix.format(layer=expert.layers - 1) in moved
    assert {OUTPUT_PROJECTION + "weight", OUTPUT_PROJECTION + "bias"} <= found
    # What is counted is what the files hold.
    sizes = {name: array.size for name, array in weights(tuned).items()}
    assert result.total == sum(sizes.values())
    assert sum(part["trainable"] for part in result.parts.values()) == result.trainable
    if supports_exact_resume():
        # lerobot 0.6 freezes the VLM's last layer, because its output is not used; 0.5.1 does not.
        assert vlm.layer_prefix.format(layer=vlm.layers - 1) not in moved
        assert result.trainable == sum(sizes[name] for name in found)
    else:
        assert sum(sizes[name] for name in found) <= result.trainable < 0.5 * result.total

    # It is a checkpoint as the one before: pruned, with its tokenizer, and it drives.
    assert Checkpoint.open(tuned).manifest == Checkpoint.open(pruned).manifest
    assert Checkpoint.open(tuned).config["train_expert_only"] == Checkpoint.open(pruned).config["train_expert_only"]
    policy = load_policy(tuned, "cpu")
    picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    assert np.isfinite(policy.predict_chunk({CAMERA: picture}, np.array([200.0, 300.0], np.float32), TASK)).all()
    assert not RunFolder.of(tuned).path.exists()
    # Asked again with --resume, it does nothing.
    assert run(request_of(train="last=2", resume=True)) == result
    with pytest.raises(ClpError, match="another seed"):
        run(request_of(train="last=2", resume=True, seed=1))


@pytest.mark.skipif(not supports_exact_resume(), reason="this lerobot does not restore the order of the frames")
def test_a_killed_run_is_resumed_to_the_weights_of_an_uninterrupted_one(
    request_of: Callable[..., FinetuneRequest], tmp_path: Path
) -> None:
    whole = run(request_of(output=tmp_path / "whole", held_out=0.3, held_out_every=3, train="all", save_every=2))
    asked = request_of(held_out=0.3, held_out_every=3, train="all", save_every=2, resume=True)
    arguments = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in ("checkpoint", "dataset", "output")]
    arguments += [
        "--steps",
        str(STEPS),
        "--batch-size=2",
        "--workers=0",
        "--device=cpu",
        "--held-out=0.3",
        "--held-out-every=3",
    ]
    command = ["-m", "clp_ros.cli", "finetune", *arguments, "--train=all", "--save-every=2", "--resume"]
    program = warm_processes.Program(command, tmp_path / "log.txt")
    folder = RunFolder.of(asked.output)
    try:
        deadline = time.monotonic() + 240
        while program.poll() is None and len(folder.losses()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(np.random.default_rng().uniform(0, 0.3))  # any instant: within a step, an evaluation or a save
    finally:
        program.kill()
        program.wait(60)
    assert program.returncode == -9, (tmp_path / "log.txt").read_text()

    resumed = run(asked)
    assert resumed.resumed_from in (2, 4)
    assert changed(Path(whole.output), Path(resumed.output)) == set()
    losses = [json.loads((Path(one.output) / "training.json").read_text())["losses"] for one in (whole, resumed)]
    assert losses[0] == losses[1]
    assert [row["step"] for row in losses[0] if "loss" in row] == list(range(1, STEPS + 1))
    assert resumed.held_out_last == whole.held_out_last


def test_adapters_are_merged_or_not(pruned: Path, request_of: Callable[..., FinetuneRequest], tmp_path: Path) -> None:
    adapter = run(request_of(train="lora=2", merge=False))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {one.name for one in Path(adapter.output).iterdir()}
    assert not (Path(adapter.output) / "model.safetensors").exists()
    merged = run(request_of(train="lora=2", output=tmp_path / "merged"))
    assert merged.trainable == adapter.trainable < 0.1 * merged.total
    # Adapters are in the action expert and the projections; nothing else may change.
    found = changed(pruned, tmp_path / "merged")
    assert found
    assert not any("vlm.model" in name for name in found)
    # What stock lerobot makes of the adapter is what was merged.
    lora = load_file(Path(adapter.output) / "adapter_model.safetensors")
    name = "model.action_out_proj"
    product = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    scale = json.loads((Path(adapter.output) / "adapter_config.json").read_text())
    expected = weights(pruned)[f"{name}.weight"] + product * scale["lora_alpha"] / scale["r"]
    np.testing.assert_allclose(weights(tmp_path / "merged")[f"{name}.weight"], expected, atol=1e-6)


def test_a_checkpoint_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path / "out")
    checkpoints = folder.run / "checkpoints"
    with folder.complete_checkpoint(checkpoints / "000002", keep_older=False) as partial:
        partial.mkdir(parents=True)
        (partial / "weights").write_text("2")
        assert folder.newest() is None
    assert folder.newest() == (2, checkpoints / "000002")
    with pytest.raises(RuntimeError), folder.complete_checkpoint(checkpoints / "000004", False) as partial:
        partial.mkdir()
        raise RuntimeError  # as a kill: what was written stays, under the other name
    assert folder.newest() == (2, checkpoints / "000002")
    folder.clear_partial()
    assert [path.name for path in checkpoints.iterdir()] == ["000002"]
    with folder.complete_checkpoint(checkpoints / "000004", False) as partial:
        partial.mkdir()
    assert [path.name for path in checkpoints.iterdir()] == ["000004"]


@pytest.mark.parametrize("text", ["last", "last=0", "lora=-1", "exprt", "last=2.5"])
def test_unknown_choices_of_weights_are_refused(text: str) -> None:
    with pytest.raises(ClpError, match="unknown choice of weights"):
        parse_trainable(text)


def test_the_command_refuses_before_it_trains(
    pruned: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, checkpoint: Path = pruned, data: Path = dataset) -> str:
        given = ("finetune", "--checkpoint", checkpoint, "--dataset", data, "--output", tmp_path / "out")
        assert main([*map(str, (*given, "--workers", 0, *arguments))]) == 1
        return capsys.readouterr().err

    assert "there is no LeRobotDataset here" in refused(data=tmp_path)
    assert "the dataset has 3 episodes" in refused("--episodes", 4)
    assert "unknown choice of weights" in refused("--train", "most")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_json_object(
    pruned: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps=1", "--batch-size=2", "--workers=0", "--device=cpu", "--episodes=1", "--json")
    folders = (f"--checkpoint={pruned}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}")
    assert main(["finetune", *folders, *options, "--", "--policy.optimizer_grad_clip_norm=0.5"]) == 0
    out, _ = capfd.readouterr()
    result = json.loads(out)
    assert {"output", "steps", "trainable", "total", "loss_first", "loss_last", "seconds"} <= result.keys()
    assert math.isfinite(result["loss_last"])
    assert result["steps"] == 1
    written = json.loads((tmp_path / "out" / "train_config.json").read_text())
    assert written["policy"]["optimizer_grad_clip_norm"] == 0.5
    assert written["dataset"]["episodes"] == [0]


@pytest.mark.slow
def test_accelerate_trains_in_several_processes(pruned: Path, dataset: Path, tmp_path: Path) -> None:
    launcher = ("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2")
    launcher += ("--num_machines=1", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no")
    folders = (f"--checkpoint={pruned}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}")
    options = ("--steps=2", "--batch-size=2", "--workers=0", "--device=cpu", "--train=last=2", "--json")
    command = [sys.executable, *launcher, "-m", "clp_ros.cli", "finetune", *folders, *options]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found = changed(pruned, tmp_path / "out")
    assert result["trainable"] == sum(weights(pruned)[name].size for name in found)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["request"]["processes"] == 2
