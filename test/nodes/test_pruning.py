# SPDX-License-Identifier: Apache-2.0
"""The pruning node as users have it: a process of its own, called over DDS."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoint_tools import put_into_hub_cache
from diagnostic_msgs.msg import DiagnosticStatus
from ros_tools import NodeProcess, Peer, parameter_arguments, running, wait_for
from std_msgs.msg import String
from std_srvs.srv import Trigger

from clp_ros.calibration.calibration_file import Calibration
from clp_ros.core.resources import resource_path
from clp_ros.jobs.prune import PruneRequest, run
from clp_ros.nodes.pruning import PARAMETERS
from clp_ros.nodes.topics import LATCHED
from clp_ros.policies.checkpoint import Checkpoint

# The node with a copy that goes on only while the file GATE is not there: what a large checkpoint on a slow disk does.
SLOW_NODE = """
import sys, time
from pathlib import Path
from clp_ros.nodes import pruning
from clp_ros.nodes.spin import main

class SlowNode(pruning.PruningNode):
    def __init__(self):
        super().__init__()
        advance, gate = self._job.progress, Path(sys.argv[1])
        def progress(done, total):
            advance(done, total)
            while not gate.exists():
                time.sleep(0.02)
                advance(done, total)
        self._job.progress = progress

sys.exit(main(SlowNode))
"""

StartNode = Callable[..., AbstractContextManager[NodeProcess]]


LAYERS = 16


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


@pytest.fixture
def calibration(checkpoint: Path, tmp_path: Path) -> Path:
    """A calibration of the checkpoint, with random scores."""
    source, rng = Checkpoint.open(checkpoint), np.random.default_rng(4)
    matrices = {}
    for module in source.layer_stacks:
        half = rng.uniform(0.8, 1, (LAYERS, LAYERS))
        matrices[module.name] = np.triu(half, 1) + np.triu(half, 1).T + np.eye(LAYERS)
    modules = {
        module.name: {
            "layers": module.layers,
            "group": module.group,
            "period": module.pattern_period,
            "dead_last": module.last_output_unused,
        }
        for module in source.layer_stacks
    }
    adjacent = {name: rng.uniform(0.1, 1, LAYERS - 1) for name in matrices}
    meta = {
        "checkpoint": {"path": str(checkpoint), "fingerprint": source.fingerprint()},
        "family": source.family.name,
        "modules": modules,
    }
    folder = tmp_path / "calibration"
    folder.mkdir()
    Calibration(meta, matrices, adjacent, adjacent).save(folder)
    return folder


@pytest.fixture
def start(ros_domain: int, tmp_path: Path) -> StartNode:
    def start(script: str | None = None, *arguments: str, **parameters: Any) -> AbstractContextManager[NodeProcess]:
        command = ["-m", "clp_ros.nodes.pruning"] if script is None else ["-c", script, *arguments]
        return running([*command, *parameter_arguments(parameters)], tmp_path / "log.txt")

    return start


def prune(peer: Peer) -> Trigger.Response:
    return peer.call(Trigger, "/pruning/prune")


def left_behind(folder: Path) -> list[str]:
    """What is in a folder besides the test's own inputs."""
    return sorted(path.name for path in folder.iterdir() if path.name not in {"base", "calibration", "log.txt", "gate"})


def test_the_parameter_file_says_what_the_node_declares() -> None:
    document = yaml.safe_load(resource_path("config/nodes/pruning.yaml").read_text(encoding="utf-8"))
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}


def test_it_prunes_and_says_what_it_did(
    peer: Peer, start: StartNode, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    with start(checkpoint=checkpoint, calibration=calibration) as node:
        response = prune(peer)
        assert response.success, response.message
        assert "\n" not in response.message
        result = json.loads(response.message)
        output = tmp_path / "base_pruned"
        assert result["output"] == str(output)
        assert (result["checkpoint"], result["calibration"]) == (str(checkpoint), str(calibration))
        # The same job without ROS removes the same layers and writes the same bytes.
        request = PruneRequest(checkpoint=checkpoint, calibration=calibration, output=tmp_path / "reference")
        assert result["removed"] == run(request).removed
        pruned = Checkpoint.open(output)
        assert result["parameters"] == {
            "before": Checkpoint.open(checkpoint).parameters(),
            "after": pruned.parameters(),
        }
        assert 0 < result["seconds"] < 60
        assert (output / "model.safetensors").read_bytes() == (tmp_path / "reference/model.safetensors").read_bytes()
        assert node.stop() == 0
        assert "Traceback" not in node.log


# The node with a hub cache of the test's own, and no network; started in the test's folder.
CACHED_NODE = """
import os, sys
from huggingface_hub import constants
constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = sys.argv[1], True
os.chdir(sys.argv[2])
from clp_ros.nodes.pruning import main
sys.exit(main())
"""


def test_a_repository_on_the_hub_is_a_checkpoint_too(
    peer: Peer, start: StartNode, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    snapshot = put_into_hub_cache(checkpoint, tmp_path / "hub", "someone/base")
    (here := tmp_path / "here").mkdir()
    places = (str(tmp_path / "hub"), str(here))
    with start(CACHED_NODE, *places, checkpoint="someone/base@main", calibration=calibration) as node:
        result = json.loads(prune(peer).message)
        assert (result["checkpoint"], result["output"]) == (str(snapshot), str(here / "base_pruned"))
        assert Checkpoint.open(here / "base_pruned").manifest["source"]["path"] == str(snapshot)
        assert peer.set_parameters("/pruning", checkpoint="someone/other") == [""]
        response = prune(peer)
        assert not response.success
        assert "hf download someone/other" in response.message
        assert "Traceback" not in node.log


def test_parameters_hold_from_the_next_call_on_and_faults_come_as_text(
    peer: Peer, start: StartNode, checkpoint: Path, calibration: Path, tmp_path: Path
) -> None:
    statuses = peer.hear_diagnostics("pruning")

    def fault(wanted: str, **values: Any) -> None:
        assert peer.set_parameters("/pruning", **values) == [""] * len(values)
        response = prune(peer)
        assert not response.success
        assert wanted in response.message
        assert "\n" not in response.message
        wait_for(
            lambda: any(wanted in status.message and status.level == DiagnosticStatus.ERROR for status in statuses),
            f"{wanted!r} on /diagnostics",
        )

    with start() as node:
        fault("checkpoint is empty")
        fault("there is no calibration", checkpoint=str(checkpoint))
        fault("the folder is not a calibration", calibration=str(tmp_path))
        fault("not MODULE=K", calibration=str(calibration), budgets=["vlm:2"])
        fault("'llm'", budgets=["llm=2"])
        fault("unknown criterion", budgets=[""], criterion="ckb")
        fault("nothing would be removed", criterion="cka", threshold=1.5)
        assert left_behind(tmp_path) == []
        assert (
            peer.set_parameters("/pruning", threshold=0.0, budgets=["vlm=2"], output=str(tmp_path / "out")) == [""] * 3
        )
        first = json.loads(prune(peer).message)
        assert len(first["removed"]["vlm"]) == len(first["removed"]["expert"]) == 2
        fault("is not empty", budgets=["expert=4"])
        assert peer.set_parameters("/pruning", overwrite=True) == [""]
        second = json.loads(prune(peer).message)
        assert len(second["removed"]["vlm"]) == 4
        assert Checkpoint.open(tmp_path / "out").layers == {"vlm": LAYERS - 4, "expert": LAYERS - 4}
        wait_for(lambda: statuses[-1].level == DiagnosticStatus.OK, "a status without the fault")
        assert node.log.count("[ERROR]") == 8
        assert "Traceback" not in node.log


def test_a_parameter_of_another_type_is_refused(peer: Peer, start: StartNode, checkpoint: Path) -> None:
    with start(checkpoint=checkpoint):
        (reason,) = peer.set_parameters("/pruning", threshold="high")
        assert "DOUBLE" in reason
        assert peer.parameter("/pruning", "threshold") == 0.0


def test_it_takes_the_folder_of_a_calibration_that_was_done_before(
    peer: Peer, start: StartNode, checkpoint: Path, calibration: Path
) -> None:
    publisher = peer.node.create_publisher(String, "/calibration/done", LATCHED)
    publisher.publish(String(data=str(calibration)))
    with start(checkpoint=checkpoint):
        wait_for(publisher.get_subscription_count, "the node's subscription")

        def received() -> dict[str, Any] | None:
            response = prune(peer)
            assert response.success or "no calibration" in response.message, response.message
            return json.loads(response.message) if response.success else None

        assert wait_for(received, "the calibration's folder")["calibration"] == str(calibration)


@pytest.fixture
def pruning_slowly(
    peer: Peer, start: StartNode, checkpoint: Path, calibration: Path, tmp_path: Path
) -> Iterator[tuple[NodeProcess, Any, Path]]:
    """A node in the middle of a pruning, the future of its response, and the file that lets it go on."""
    gate = tmp_path / "gate"
    with start(SLOW_NODE, str(gate), checkpoint=checkpoint, calibration=calibration) as node:
        statuses = peer.hear_diagnostics("pruning")
        future = peer.start_call(Trigger, "/pruning/prune")
        wait_for(lambda: future.done() or (statuses and statuses[-1].values.get("done")), "progress on /diagnostics")
        assert not future.done(), future.result().message
        yield node, future, gate


def test_while_it_prunes_everything_answers_and_a_second_pruning_is_refused(
    peer: Peer, pruning_slowly: tuple[NodeProcess, Any, Path], tmp_path: Path
) -> None:
    node, first, gate = pruning_slowly
    statuses = peer.hear_diagnostics("pruning")
    second = prune(peer)
    assert not second.success
    assert "still running" in second.message
    assert peer.parameter("/pruning", "criterion") == "cka"
    assert peer.set_parameters("/pruning", criterion="mse") == [""]
    wait_for(lambda: len(statuses) >= 2, "two more statuses")
    assert {(status.level, status.message) for status in statuses} == {(DiagnosticStatus.OK, "pruning")}
    assert all(0 < int(status.values["done"]) < int(status.values["total"]) for status in statuses)
    assert not first.done()
    assert not (tmp_path / "base_pruned").exists()
    gate.touch()
    wait_for(first.done, "the first response")
    # What was set while it ran holds for the next one only.
    assert json.loads(first.result().message)["criterion"] == "cka"
    assert Checkpoint.open(tmp_path / "base_pruned").manifest["criterion"] == "cka"
    assert "Traceback" not in node.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing_behind(
    pruning_slowly: tuple[NodeProcess, Any, Path], tmp_path: Path, number: int
) -> None:
    node, _, _ = pruning_slowly
    assert any("partial" in name for name in left_behind(tmp_path))  # so it was in the middle
    assert node.stop(number) == 0
    assert left_behind(tmp_path) == []
    assert "Traceback" not in node.log
