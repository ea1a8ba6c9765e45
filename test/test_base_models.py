# SPDX-License-Identifier: Apache-2.0
"""Base models as published: calibrated with a dataset's or the bags' own statistics, and never driven without any."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
import yaml
from checkpoint_tools import edit_json
from safetensors.torch import load_file, save_file

from clp_ros.bags.reader import open_bag
from clp_ros.cli import main
from clp_ros.core.resources import resource_path
from clp_ros.datasets.episodes import read_frames, usable_ticks
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.robots.embodiment import load_embodiment

BAG = resource_path("rosbags/ur5")
STATE, ACTION = "observation.state", "action"
TASK = "Push the cube."
NORMALISER = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def robot(folder: Path, *cameras: str) -> Path:
    """The UR5 of the recorded demonstration, its cameras feeding these features."""
    document = yaml.safe_load(resource_path("config/embodiments/ur5.yaml").read_text())
    for camera, name in zip(document["cameras"].values(), cameras, strict=True):
        camera["feature"] = f"observation.images.{name}"
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def calibrate(tmp_path: Path) -> Callable[..., int]:
    """``calibrate(checkpoint, output, *options)``: the command, on two frames."""

    def calibrate(checkpoint: Path, output: str, *options: object, embodiment: Path | None = None) -> int:
        given = [checkpoint, "--bag", BAG, "--embodiment", embodiment or tmp_path / "robot.yaml", "--task", TASK]
        given += ["--samples", "2", "--device", "cpu", "--json", "--output", tmp_path / output, *options]
        return main(["calibrate", "--checkpoint", *map(str, given)])

    return calibrate


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """The state at every control tick of the demonstration that can be used, (ticks, 7)."""
    embodiment, reader = load_embodiment("ur5"), open_bag(BAG)
    ticks = usable_ticks(reader, embodiment).usable
    assert (np.diff(ticks) == embodiment.period_ns).all()  # so that each tick's action is the next one's state
    frames = read_frames(reader, embodiment, ticks.tolist(), 1)
    return np.array([frame.observation.state for frame in frames], dtype=np.float64)


def statistics(values: np.ndarray) -> dict[str, np.ndarray]:
    found = {"mean": values.mean(axis=0), "std": values.std(axis=0), "min": values.min(axis=0)}
    found |= {"max": values.max(axis=0)}
    return found | {f"q{share:02}": np.quantile(values, share / 100, axis=0) for share in (1, 10, 50, 90, 99)}


def finetuned(base: Path, folder: Path, stats: dict[str, dict[str, np.ndarray]]) -> Path:
    """The base with processors that lerobot makes for a dataset of these statistics, its tokenizer as it was."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    shutil.copytree(base, folder)
    size = len(stats[ACTION]["mean"])
    edit_json("config.json", lambda d: d["output_features"][ACTION].update(shape=[size]))(folder)
    with quiet():
        config = PreTrainedConfig.from_pretrained(folder)
        tensors = {
            key: {name: torch.tensor(v, dtype=torch.float32) for name, v in s.items()} for key, s in stats.items()
        }
        features = {**config.input_features, **config.output_features}
        given = {"norm_map": config.normalization_mapping, "stats": tensors}
        for processor in make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"normalizer_processor": {"features": features, **given}},
            postprocessor_overrides={"unnormalizer_processor": {"features": config.output_features, **given}},
        ):
            processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["smolvla", "pi0", "pi05"])
def test_a_base_model_is_calibrated_as_if_it_had_the_statistics(
    name: str, states: np.ndarray, calibrate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    if name == "smolvla":
        published.smolvla_base(base)
        robot(tmp_path, "camera1", "camera3")
    else:
        published.pi_base(name, base)
        robot(tmp_path, "base_0_rgb", "right_wrist_0_rgb")
    assert calibrate(base, "refused") == 1  # it says 6 or 32 components, and nothing of what the robot's seven mean
    assert "give --statistics" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()

    expected = {STATE: statistics(states), ACTION: statistics(states[1:])}
    assert calibrate(base, "bags", "--statistics", "bags") == 0
    captured = capsys.readouterr()
    left_out = "observation.images.camera2" if name == "smolvla" else "observation.images.left_wrist_0_rgb"
    assert captured.err == f"warning: the camera {left_out} is left out: embodiment ur5 does not have it\n"
    meta = json.loads((tmp_path / "bags" / "calibration.json").read_text())
    assert json.loads(captured.out)["statistics"] == meta["statistics"]
    assert meta["left_out_cameras"] == [left_out]
    assert len(meta["cameras"]) == 2
    assert (meta["statistics"]["source"], meta["statistics"]["steps"]) == ("bags", len(states))
    for feature, numbers in expected.items():
        assert meta["statistics"]["values"][feature].keys() == numbers.keys()
        for key, vector in numbers.items():
            np.testing.assert_allclose(meta["statistics"]["values"][feature][key], vector, rtol=1e-12, atol=1e-12)

    # lerobot's own processors, given these statistics, are the reference: padded state and actions, absent camera.
    assert calibrate(finetuned(base, tmp_path / "finetuned", expected), "reference") == 0
    reference = json.loads((tmp_path / "reference" / "calibration.json").read_text())
    assert reference["statistics"] == {"source": "checkpoint"}
    matrices = {one: (tmp_path / one / "cka.npz").read_bytes() for one in ("bags", "reference")}
    assert matrices["bags"] == matrices["reference"]


@pytest.fixture
def dataset(tmp_path: Path, states: np.ndarray) -> Path:
    """A LeRobotDataset's folder, as far as its statistics go."""
    (tmp_path / "dataset" / "meta").mkdir(parents=True)
    found = {STATE: statistics(states), ACTION: statistics(states[1:])}
    document = {key: {name: vector.tolist() for name, vector in one.items()} for key, one in found.items()}
    document |= {"timestamp": {"mean": [1.0], "count": [9]}}
    (tmp_path / "dataset" / "meta" / "stats.json").write_text(json.dumps(document))
    return tmp_path / "dataset"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolVLA base model. Tests read it and write elsewhere."""
    return published.smolvla_base(tmp_path_factory.mktemp("published") / "smolvla_base")


def test_a_datasets_statistics_give_what_the_same_ones_of_the_bags_give(
    base: Path, dataset: Path, calibrate: Callable[..., int], tmp_path: Path
) -> None:
    robot(tmp_path, "camera1", "camera2")
    assert calibrate(base, "bags", "--statistics", "bags") == 0
    assert calibrate(base, "dataset_s", "--statistics", dataset) == 0
    meta = json.loads((tmp_path / "dataset_s" / "calibration.json").read_text())
    assert (meta["statistics"]["source"], meta["statistics"]["path"]) == ("dataset", str(dataset))
    report = (tmp_path / "dataset_s" / "report.html").read_text()
    assert str(dataset) in report
    assert str(meta["statistics"]["values"][STATE]["mean"][0]) not in report
    bags = json.loads((tmp_path / "bags" / "calibration.json").read_text())
    assert meta["statistics"]["values"] == bags["statistics"]["values"]
    assert (tmp_path / "bags" / "cka.npz").read_bytes() == (tmp_path / "dataset_s" / "cka.npz").read_bytes()
    pruned = ["prune", "--checkpoint", str(base), "--calibration", str(tmp_path / "bags"), "--json"]
    assert main([*pruned, "--output", str(tmp_path / "pruned")]) == 0
    assert main(["verify", "--json", str(tmp_path / "pruned")]) == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.pop(ACTION), "the file has no statistics of action"),
        (lambda d: d[STATE]["std"].pop(), "the statistics of observation.state are missing or differ in length"),
        (
            lambda d: d[STATE].update(mean=[float("nan")] * 7),
            "mean of observation.state is not a list of finite numbers",
        ),
        (lambda d: d[STATE].pop("std"), "MEAN_STD needs the statistics std of observation.state"),
        (
            lambda d: d.update({key: {name: vector[:6] for name, vector in d[key].items()} for key in (STATE, ACTION)}),
            "the statistics of observation.state have 6 components; embodiment ur5 has 7 joints",
        ),
        (lambda d: d[STATE].update(std=[-1.0] * 7), "std of observation.state is negative"),
        (lambda d: d[ACTION].update(q01=[2.0] * 7, q99=[1.0] * 7), "q01 of action is above q99"),
        (None, "there is no meta/stats.json"),
    ],
)
def test_statistics_that_do_not_serve_are_refused(
    damage: Callable[[Any], Any] | None,
    words: str,
    base: Path,
    dataset: Path,
    calibrate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    robot(tmp_path, "camera1", "camera2")
    path = dataset / "meta" / "stats.json"
    if damage is None:
        path.unlink()
    else:
        document = json.loads(path.read_text())
        damage(document)
        path.write_text(json.dumps(document))
    assert calibrate(base, "out", "--statistics", dataset) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_an_older_layout_is_named(
    base: Path, calibrate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot(tmp_path, "camera1", "camera2")
    (tmp_path / "old" / "meta").mkdir(parents=True)
    (tmp_path / "old" / "meta" / "episodes_stats.jsonl").touch()
    assert calibrate(base, "out", "--statistics", tmp_path / "old") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "LeRobotDataset v2.1" in line
    (program,) = re.findall(r"python -m (\S+)", line)
    assert find_spec(program) is not None


@pytest.fixture
def raw(family_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """``raw(family)``: a checkpoint for the UR5 whose statistics are under another robot's names."""

    def make(name: str) -> Path:
        folder = shutil.copytree(family_checkpoint(name, "ur5"), tmp_path / "raw")
        for file in folder.glob("policy_*.safetensors"):
            tensors = load_file(file)
            if f"{ACTION}.mean" in tensors:  # GR00T's tokenizer is in such a file, too
                save_file({f"ur3.buffer.{key}": value for key, value in tensors.items()}, file)
        return folder

    return make


@pytest.mark.parametrize("name", ["smolvla", "groot", "groot_n1_7"])
def test_raw_values_are_warned_of(
    name: str,
    raw: Callable[[str], Path],
    family_checkpoint: Callable[..., Path],
    calibrate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    embodiment, checkpoint = robot(tmp_path, "cam_front", "cam_wrist"), raw(name)
    capsys.readouterr()
    assert calibrate(checkpoint, "out", embodiment=embodiment) == 0
    warning = "no statistics for observation.state and action: lerobot uses raw values"
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {warning}")
    assert "--statistics bags" in captured.err
    meta = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert meta["statistics"] == {"source": "none", "raw": [STATE, ACTION]}
    assert main(["verify", str(checkpoint)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"warning: {warning}")
    assert main(["verify", "--json", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["raw_features"] == [STATE, ACTION]
    if name == "smolvla":
        return
    # GR00T's own steps take statistics as well: the same ones give the same, whatever the checkpoint had.
    whole = family_checkpoint(name, "ur5")
    for one, output in ((checkpoint, "given"), (whole, "instead")):
        assert calibrate(one, output, "--statistics", "bags", embodiment=embodiment) == 0
    given, instead, unscaled = (tmp_path / one / "cka.npz" for one in ("given", "instead", "out"))
    assert given.read_bytes() == instead.read_bytes() != unscaled.read_bytes()


def test_one_feature_without_statistics_is_told_and_identity_needs_none(
    raw: Callable[[str], Path],
    family_checkpoint: Callable[..., Path],
    calibrate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, raw = family_checkpoint("smolvla", "ur5"), raw("smolvla")
    tensors = load_file(whole / NORMALISER)
    save_file({name: value for name, value in tensors.items() if name.startswith(ACTION)}, raw / NORMALISER)
    after = next(whole.glob("policy_postprocessor*.safetensors"))
    shutil.copy(after, raw / after.name)
    capsys.readouterr()  # where this test is the first to ask for that checkpoint
    assert main(["verify", "--json", str(raw)]) == 0
    assert json.loads(capsys.readouterr().out)["raw_features"] == [STATE]

    def identity(step: dict[str, Any]) -> None:
        step["config"]["norm_map"]["STATE"] = "IDENTITY"

    published.rewrite_json(raw, published.processors(identity))
    # The base model's entry, which fine-tuning keeps, and which lerobot never looks at.
    edit_json("config.json", lambda d: d["input_features"][STATE].update(shape=[6]))(raw)
    assert main(["verify", str(raw)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert calibrate(raw, "out", embodiment=robot(tmp_path, "cam_front", "cam_wrist")) == 0
    assert capsys.readouterr().err == ""
    assert main(["verify", str(whole)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_quantiles_that_are_not_there_are_told_before_lerobot_fails(
    family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(family_checkpoint("pi05", "ur5"), tmp_path / "pi05")
    for file in folder.glob("policy_*.safetensors"):
        kept = {name: value for name, value in load_file(file).items() if ".q" not in name}
        save_file(kept, file)
    assert main(["verify", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "QUANTILES needs the statistics q01, q99 of observation.state, which are missing" in error
    assert "--statistics bags" in error


def test_statistics_of_another_size_than_the_actions_are_told(
    family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lerobot 0.4 kept the base's output_features, and its own unnormaliser fails on what it trained."""
    folder = shutil.copytree(family_checkpoint("smolvla", "ur5"), tmp_path / "old")
    edit_json("config.json", lambda d: d["output_features"][ACTION].update(shape=[6]))(folder)
    assert main(["verify", str(folder)]) == 1
    assert "the actions have 6 components, their statistics 7" in capsys.readouterr().err


def test_a_rename_map_that_exchanges_two_cameras_exchanges_none(tiny_policy: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_policy.checkpoint.path, tmp_path / "swapped")
    left, right = "observation.images.cam_left_wrist", "observation.images.cam_right_wrist"

    def swap(document: dict[str, Any]) -> None:
        (step,) = (one for one in document["steps"] if one["registry_name"] == "rename_observations_processor")
        step["config"]["rename_map"] = {left: right, right: left}

    edit_json("policy_preprocessor.json", swap)(folder)
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for key in tiny_policy.image_features}
    state = rng.standard_normal(14).astype(np.float32)
    noise = torch.from_numpy(rng.standard_normal((1, 50, 32), dtype=np.float32))
    expected = tiny_policy.predict_chunk(images, state, TASK, noise=noise)
    np.testing.assert_array_equal(load_policy(folder, "cpu").predict_chunk(images, state, TASK, noise=noise), expected)
    images[left], images[right] = images[right], images[left]
    assert not np.array_equal(tiny_policy.predict_chunk(images, state, TASK, noise=noise), expected)
