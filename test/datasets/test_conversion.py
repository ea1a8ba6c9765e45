# SPDX-License-Identifier: Apache-2.0
"""Bags become a LeRobotDataset: its frames are the policy's observations, its statistics exact; bad bags; resuming."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bag_tools
import numpy as np
import pytest
import yaml
from lerobot.datasets import video_utils
from robot_tools import EYE, MS, START, STATES, document, picture, recorded_states, sync

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.datasets import conversion, dataset_folder, dataset_writer
from clp_ros.jobs import convert
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.observation import NotReadyError, ObservationBuffer

WriteBag = Callable[..., Path]
HEIGHT, WIDTH = 64, 96


def scene(number: int) -> np.ndarray:
    """A picture that video can store: a bright block that moves with the number."""
    rows = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rows[..., 0] = np.arange(WIDTH)
    left = 7 * number % (WIDTH - 16)
    rows[10 : 10 + 3 * (number % 16), left : left + 16] = (255, 128, 40)
    return rows


def recording(steps: int, seed: int = 0, size: int = 1, silent: range = range(0)) -> list[tuple[str, Any, int]]:
    """States every 20 ms with jitter, and a picture every 40 ms, at another time than the states."""
    rng = np.random.default_rng(seed)
    messages = []
    for step in range(steps):
        stamp = START + step * 20 * MS + int(rng.integers(0, 4)) * MS
        waist, elbow = rng.normal(size=2)
        messages.append((STATES, recorded_states(stamp, waist, elbow, rng.uniform(0.02, 0.06)), stamp + MS))
        if step % 2 == 0 and step not in silent:
            rows = np.kron(scene(step + seed), np.ones((size, size, 1), np.uint8))
            messages.append((EYE, bag_tools.image(rows, "rgb8", stamp_ns=stamp + 5 * MS), stamp + 9 * MS))
    return messages


@pytest.fixture(scope="module")
def robot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("robot") / "small_arm.yaml"
    path.write_text(yaml.safe_dump(document(sync("asof", 100.0), sync("asof", 60.0)), sort_keys=False))
    return path


@pytest.fixture
def to_dataset(robot_file: Path, tmp_path: Path) -> Callable[..., convert.ConvertResult]:
    """Converts bags into the test's folder ``dataset``, as PNG by default."""

    def call(*bags: Path, **options: Any) -> convert.ConvertResult:
        given: dict[str, Any] = {"images": "png", "task": "move the block", "output": tmp_path / "dataset"}
        request = convert.ConvertRequest(**{"bags": bags, "embodiment": robot_file, **given, **options})
        return convert.run(request)

    return call


def stock(root: Path) -> Any:
    """LeRobot's own dataset. Its Arrow cache goes beside it."""
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset("test/dataset", root=root)


def pixels(picture: Any) -> np.ndarray:
    return (picture.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)


def contents(root: Path) -> list[tuple[int, str, bytes, bytes]]:
    dataset = stock(root)
    return [
        (
            int(row["episode_index"]),
            row["task"],
            row["action"].numpy().tobytes(),
            pixels(row["observation.images.eye"]).tobytes(),
        )
        for row in (dataset[index] for index in range(len(dataset)))
    ]


def test_frames_are_what_the_policy_would_have_observed(
    write_bag: WriteBag, to_dataset: Callable[..., Any], robot_file: Path
) -> None:
    messages = recording(40)
    result = to_dataset(write_bag(messages), stamps=True)
    dataset, robot = stock(result.output), load_embodiment(robot_file)
    # As the policy node does it: a buffer gets each message when it is received, and is asked at the tick.
    buffer, arrived, row = ObservationBuffer(robot), iter(sorted(messages, key=lambda one: one[2])), 0
    states = {}
    waiting = next(arrived)
    first = min(receive for _, _, receive in messages)
    for tick in range(first, max(receive for _, _, receive in messages) + robot.period_ns, robot.period_ns):
        while waiting is not None and waiting[2] <= tick:
            buffer.add(waiting[0], waiting[1], waiting[2])
            waiting = next(arrived, None)
        try:
            states[tick] = buffer.state(tick)
            observation = buffer.observe(tick)
        except NotReadyError:
            continue
        if row == len(dataset):
            break  # the last tick has no next state
        stored = dataset[row]
        np.testing.assert_array_equal(stored["observation.state"].numpy(), observation.state)
        np.testing.assert_array_equal(
            pixels(stored["observation.images.eye"]), observation.images["observation.images.eye"]
        )
        assert stored["stamps"].tolist() == [tick, observation.stamps[EYE], observation.stamps[STATES]]
        assert stored["timestamp"] == pytest.approx(row / 50)
        assert stored["task"] == "move the block"
        row += 1
    assert row == len(dataset) == result.frames > 35
    after = [states[int(dataset[index]["stamps"][0]) + robot.period_ns] for index in range(row)]
    np.testing.assert_array_equal([dataset[index]["action"].numpy() for index in range(row)], after)
    assert dataset.meta.features["action"]["names"] == ["finger", "waist", "elbow"]


def test_statistics_are_exact(
    write_bag: WriteBag, to_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_PART_BYTES", 1)  # each bag is a part of its own
    result = to_dataset(write_bag(recording(12)), write_bag(recording(30, seed=1)))
    found = json.loads((result.output / "meta" / "stats.json").read_text())
    dataset = stock(result.output)
    rows = [dataset[index] for index in range(len(dataset))]
    for name in ("observation.state", "action", "index"):
        values = np.array([row[name].numpy() for row in rows], dtype=float).reshape(len(rows), -1)
        for key, quantile in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            np.testing.assert_allclose(found[name][key], np.quantile(values, quantile, axis=0), rtol=1e-12)
        np.testing.assert_allclose(found[name]["mean"], values.mean(axis=0))
        np.testing.assert_allclose(found[name]["std"], values.std(axis=0))
        assert found[name]["count"] == [len(rows)]
    pictures = np.stack([pixels(row["observation.images.eye"]) for row in rows]).reshape(-1, 3) / 255
    for key, quantile in (("min", 0), ("q01", 0.01), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99), ("max", 1)):
        right = np.quantile(pictures, quantile, axis=0)
        np.testing.assert_allclose(np.ravel(found["observation.images.eye"][key]), right, atol=1e-12)
    np.testing.assert_allclose(np.ravel(found["observation.images.eye"]["std"]), pictures.std(axis=0))


def test_bad_bags_are_left_out_and_added_later(
    write_bag: WriteBag,
    to_dataset: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    robot_file: Path,
) -> None:
    good = write_bag(recording(10), "good")
    no_states = write_bag([one for one in recording(10, seed=1) if one[0] == EYE], "no_states")
    larger = write_bag(recording(10, seed=2, size=2), "larger")
    options = ["--embodiment", str(robot_file), "--task", "move the block", "--images", "png"]
    command = ["convert", "--bag", *map(str, (good, no_states, tmp_path / "gone", larger)), *options]
    assert main([*command, "--output", str(tmp_path / "dataset"), "--json"]) == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err.startswith("error: clp convert: 3 bags left out: ")
    assert captured.err.count("\n") == 1
    assert (printed["episodes"], printed["frames"], printed["fps"]) == (1, 8, 50)
    why = {Path(one["bag"]).name: one["why"] for one in printed["left_out"]}
    assert "topic /states is not in the bag" in why["no_states"]
    assert "does not exist" in why["gone"]
    assert "192x128, those of the dataset 96x64" in why["larger"]
    before = contents(tmp_path / "dataset")
    write_bag(recording(14, seed=1), "gone")
    result = to_dataset(good, tmp_path / "gone")
    assert (result.episodes, result.frames, len(result.added), result.left_out) == (2, 20, 1, [])
    assert contents(tmp_path / "dataset")[: len(before)] == before
    assert to_dataset(good, tmp_path / "gone").added == []
    with pytest.raises(ClpError, match="converted with other settings \\(stamps\\)"):
        to_dataset(good, stamps=True)


def test_the_task_of_each_bag_is_in_a_file_beside_it(
    write_bag: WriteBag, to_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    bags = [write_bag(recording(8, seed=seed), f"episode_{seed}") for seed in range(3)]
    (tmp_path / "episodes.csv").write_text('bag,instruction\nepisode_0,push\nepisode_1,"lift, then turn"\n')
    result = to_dataset(*bags, task=None)
    assert [(one.bag.name, one.task) for one in result.added] == [
        ("episode_0", "push"),
        ("episode_1", "lift, then turn"),
    ]
    assert "no instruction for the bag episode_2" in result.left_out[0].why
    assert stock(result.output)[8]["task"] == "lift, then turn"


def test_pictures_that_the_encoder_does_not_take_are_a_reason(
    write_bag: WriteBag, to_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    tiny, odd = (
        [(EYE, picture(one[2]) if rows is None else bag_tools.image(rows, "rgb8", stamp_ns=one[2]), one[2])
         if one[0] == EYE else one for one in recording(8, seed)]
        for seed, rows in ((0, None), (1, np.zeros((65, 97, 3), np.uint8)))
    )  # fmt: skip
    result = to_dataset(write_bag(tiny), write_bag(odd), images="video")
    assert result.episodes == 0
    assert "libsvtav1 does not take pictures of 2x2" in result.left_out[0].why
    assert "width and height are even, but the pictures are 97x65" in result.left_out[1].why
    assert not (tmp_path / "dataset").exists()
    assert not list(tmp_path.glob("*dataset*"))


def test_video_drops_no_frame(
    write_bag: WriteBag, to_dataset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The encoder takes longer for a picture than LeRobot waits, and its queue holds one picture.
    original = video_utils.Image.fromarray
    monkeypatch.setattr(video_utils.Image, "fromarray", lambda rows: (time.sleep(0.15), original(rows))[1])
    monkeypatch.setattr(dataset_writer, "_WAITING", 1)
    result = to_dataset(write_bag(recording(16)), images="video")
    dataset = stock(result.output)
    assert len(dataset) == result.frames == 14
    for index in range(14):
        found = pixels(dataset[index]["observation.images.eye"]).astype(int)
        distances = [np.abs(found - scene(number)).mean() for number in range(0, 16, 2)]
        assert np.argmin(distances) == index // 2


@pytest.fixture(scope="module")
def three_bags(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    return [bag_tools.write_bag(folder / f"bag_{seed}", recording(8, seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def at_once(three_bags: list[Path], robot_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three bags, converted in one go."""
    output = tmp_path_factory.mktemp("at_once") / "dataset"
    request = convert.ConvertRequest(
        bags=tuple(three_bags), embodiment=robot_file, output=output, task="move the block", images="png"
    )
    assert convert.run(request).episodes == 3
    return output


def statistics(root: Path) -> dict[str, Any]:
    return json.loads((root / "meta" / "stats.json").read_text())


def kill_at(module: Any, name: str, call: int) -> None:
    """Lets this process be killed at a call of a function, before it does anything."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, killed)


@pytest.mark.parametrize(
    ("module", "name", "call", "parts"),
    [
        (dataset_writer.DatasetWriter, "add", 10, 1),  # in the second bag
        (dataset_folder, "check_merged", 1, 3),  # the joined dataset is still under its temporary name
        (conversion.Converter, "_delete_parts", 1, 3),  # the dataset is there, and its parts too
    ],
    ids=["frame", "join", "parts"],
)
def test_a_killed_conversion_is_continued(
    three_bags: list[Path],
    at_once: Path,
    to_dataset: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    call: int,
    parts: int,
) -> None:
    monkeypatch.setattr(conversion, "_PART_BYTES", 1)
    child = os.fork()
    if not child:
        kill_at(module, name, call)
        to_dataset(*three_bags)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    output = tmp_path / "dataset"
    assert len(list((tmp_path / "dataset.parts").glob("part_*"))) == parts
    assert output.exists() == (name == "_delete_parts")
    result = to_dataset(*three_bags)
    assert (result.episodes, len(result.added)) == (3, 3 - parts)
    assert contents(output) == contents(at_once)
    assert statistics(output) == statistics(at_once)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset"]


def test_shards_are_merged(
    three_bags: list[Path], at_once: Path, to_dataset: Callable[..., Any], tmp_path: Path, robot_file: Path
) -> None:
    output = tmp_path / "dataset"
    merge = ["convert", "--merge", "--output", str(output), "--json"]
    assert main(merge) == 1  # there is nothing to merge
    assert to_dataset(*three_bags, shard=(1, 2)).output == tmp_path / "dataset.shard-1-of-2"
    with pytest.raises(ClpError, match="shard 0 of 2 is missing"):
        to_dataset(merge=(), embodiment=None)
    to_dataset(*three_bags, shard=(0, 2))
    assert main(merge) == 0
    assert contents(output) == contents(at_once)
    assert statistics(output) == statistics(at_once)
    # The merged dataset takes further bags.
    assert to_dataset(*three_bags).added == []
    with pytest.raises(ClpError, match=r"is in .*shard-0-of-2 too"):
        to_dataset(merge=(tmp_path / "dataset.shard-0-of-2", output), output=tmp_path / "other")
    with pytest.raises(ClpError, match="3 bags cannot make 4 shards"):
        to_dataset(*three_bags, shard=(0, 4))
