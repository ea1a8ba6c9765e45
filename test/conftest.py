# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Tests may import what they share (bag_tools); --import-mode=importlib puts nothing on the path by itself.
sys.path.append(str(Path(__file__).parent))
# Threads of OpenMP that wait for each other spin, unless told otherwise before PyTorch is imported. Two tests at a time
# on two cores, each with two such threads, can stand still for minutes.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# First, so that two workers that take a file each end at about the same time.
_LONG = (
    *("test_lerobot_train.py", "test_layouts.py", "test_benchmark.py", "test_cli.py", "test_surgery.py"),
    *("test_removals.py", "test_processes.py", "test_flops.py", "test_plugin.py"),
)
# The demonstration starts a robot and a policy node of its own, and plays in real time.
_REAL_TIME = ("test_demo.py",)
# These talk to nodes over DDS and wait for answers, however late. They play no robot, whose messages must come in time,
# but where they replay a recording.
_AT_ANY_PACE = (
    *("test_calibration.py", "test_pruning.py", "test_rehearsal.py", "test_lifecycle.py", "test_spin.py"),
    *("test_policy_settings.py", "test_live_frames.py"),
)
# What rests on lerobot's own code: tests with a checkpoint that lerobot made, and these, which make theirs.
_LEROBOT_FIXTURES = {"tiny_checkpoint", "family_checkpoint"}
_LEROBOT = ("test_lerobot_train.py", "test_plugin.py", "test_layouts.py", "test_base_models.py")
# Not these: reading headers and splitting work over processes know nothing of lerobot.
_NOT_LEROBOT = ("test_checkpoint.py", "test_processes.py")

_bag_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that rest on lerobot, and those in real time.

    The latter want the machine to themselves: ``make test`` runs them after the others.
    Where a test plays the robot, a machine that stops it for some tenths of a second makes a camera die. A test over
    DDS is tried up to twice more, and reported as rerun.
    """
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        rests = item.path.parent.name == "policies" or item.path.name in _LEROBOT or fixtures & _LEROBOT_FIXTURES
        if rests and item.path.name not in _NOT_LEROBOT:
            item.add_marker(pytest.mark.lerobot)
        if "ros_domain" in fixtures or item.path.name in _REAL_TIME:
            item.add_marker(pytest.mark.flaky(reruns=2))
            if item.path.name not in _AT_ANY_PACE or "replay" in fixtures:
                item.add_marker(pytest.mark.real_time)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings and robot descriptions that is kept beside the checkout."""
    folder = Path(os.environ.get("CLP_ROS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "bags").is_dir():
        pytest.skip(f"no shared test data in {folder} (set CLP_ROS_SHARED_DATA)")
    return folder


@pytest.fixture
def ros_domain() -> Iterator[int]:
    """A ROS domain of this test's own, in the environment: see ros_tools.own_domain."""
    import ros_tools

    with ros_tools.own_domain() as domain:
        yield domain


@pytest.fixture
def write_bag(tmp_path: Path) -> Callable[..., Path]:
    """Writes a bag into the test's folder: ``write_bag(messages, **options)``, see bag_tools.write_bag."""
    import bag_tools

    def write(messages: bag_tools.Recorded, name: str | None = None, **options: object) -> Path:
        return bag_tools.write_bag(tmp_path / (name or f"bag_{next(_bag_numbers)}"), messages, **options)

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SmolVLA of lerobot's own classes for the bimanual ALOHA. Tests read it and write elsewhere."""
    from clp_ros.jobs.make_checkpoint import MakeCheckpointRequest, run

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    run(MakeCheckpointRequest(family="smolvla", size="tiny", embodiment="aloha_bimanual", output=folder))
    return folder


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``family_checkpoint(name, embodiment=None)``: a family's tiny random checkpoint, made once for a robot.

    Tests read it and write elsewhere. A family whose lerobot is not installed skips the test, with the reason.
    """
    from clp_ros.core.errors import ClpError
    from clp_ros.jobs.make_checkpoint import MakeCheckpointRequest, run
    from clp_ros.policies.family import check_lerobot
    from clp_ros.policies.registry import family_named

    made: dict[tuple[str, str | None], Path] = {}

    def checkpoint(name: str, embodiment: str | None = None) -> Path:
        try:
            check_lerobot(family_named(name))
        except ClpError as error:
            pytest.skip(str(error))
        if (name, embodiment) not in made:
            folder = tmp_path_factory.mktemp("families") / name
            run(MakeCheckpointRequest(family=name, size="tiny", embodiment=embodiment, output=folder))
            made[name, embodiment] = folder
        return made[name, embodiment]

    return checkpoint


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a benchmark have imported lerobot. The command line's own test has new interpreters, as users have."""
    import warm_processes

    context = warm_processes.server()
    monkeypatch.setattr("clp_ros.evaluation.measurement.multiprocessing.get_context", lambda method: context)


@pytest.fixture(scope="session")
def recording() -> Path:
    """The recorded demonstration of the bimanual ALOHA that the repository ships."""
    return ROOT / "rosbags" / "aloha_bimanual"


@pytest.fixture(scope="session")
def tiny_policy(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint, loaded on the CPU. A test that changes it puts it back."""
    from clp_ros.policies.loading import load_policy

    return load_policy(tiny_checkpoint, "cpu")


@pytest.fixture(scope="session")
def mapped_policy(tiny_checkpoint: Path) -> Any:
    """The same, as calibration loads it: the last bits of its results may differ."""
    from clp_ros.policies.loading import load_policy

    return load_policy(tiny_checkpoint, "cpu", mapped=True)


@pytest.fixture(scope="session")
def tiny_calibration(tiny_checkpoint: Path, recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration folder of the tiny checkpoint: 4 frames of the recording, seed 0."""
    from clp_ros.jobs.calibrate import CalibrateRequest, run

    folder = tmp_path_factory.mktemp("calibrations") / "tiny"
    files = {"checkpoint": tiny_checkpoint, "bags": [recording], "output": folder}
    run(CalibrateRequest(**files, embodiment="aloha_bimanual", task="transfer_cube", samples=4, device="cpu"))
    return folder


@pytest.fixture
def peer(ros_domain: int) -> Iterator[Any]:
    """A node in this process, in the test's own domain: see ros_tools.Peer."""
    import ros_tools

    with ros_tools.Peer(ros_domain) as peer:
        yield peer
