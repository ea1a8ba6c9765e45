# SPDX-License-Identifier: Apache-2.0
"""The demo's last step when it fails: the policy node's error is reported at once, and no node keeps running."""

import os
import signal
from pathlib import Path

import pytest
from ros_tools import NodeProcess, running, wait_for

from clp_ros.core.resources import resource_path

BAG = resource_path("rosbags/aloha_bimanual")


def command(checkpoint: Path, task: str = "transfer_cube") -> list[str]:
    options = {"checkpoint": checkpoint, "bag": BAG, "embodiment": "aloha_bimanual", "task": task}
    return ["-m", "clp_ros.nodes.rehearsal", *(f"--{name}={value}" for name, value in options.items())]


def child_of(rehearsal: NodeProcess) -> int:
    """The policy node's process, once it runs."""
    children = Path(f"/proc/{rehearsal.process.pid}/task/{rehearsal.process.pid}/children")
    return int(wait_for(lambda: children.read_text().split(), "the policy node")[0])


def test_a_checkpoint_that_cannot_be_loaded_is_reported_with_the_nodes_error(ros_domain: int, tmp_path: Path) -> None:
    # A sentence that YAML would take for something else reaches the node as it is.
    with running(command(tmp_path / "missing", task="Stop: do nothing, {please"), tmp_path / "log.txt") as rehearsal:
        assert rehearsal.process.wait(60) == 1
    last = rehearsal.log.strip().splitlines()[-1]
    assert last.startswith("error: /policy: the policy node refused to configure: ")
    assert str(tmp_path / "missing") in last


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the child in Linux's /proc")
def test_a_node_that_dies_is_reported(ros_domain: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with running(command(tiny_checkpoint), tmp_path / "log.txt") as rehearsal:
        os.kill(child_of(rehearsal), signal.SIGKILL)
        assert rehearsal.process.wait(60) == 1
    assert rehearsal.log.strip().splitlines()[-1].startswith("error: /policy: the policy node ended by itself: ")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the child in Linux's /proc")
@pytest.mark.parametrize(
    ("number", "when"), [(signal.SIGINT, "starting"), (signal.SIGTERM, "starting"), (signal.SIGTERM, "driving")]
)
def test_a_signal_ends_the_node_too(
    ros_domain: int, tiny_checkpoint: Path, tmp_path: Path, number: int, when: str
) -> None:
    with running(command(tiny_checkpoint), tmp_path / "log.txt") as rehearsal:
        child = child_of(rehearsal)
        if when == "driving":
            wait_for(lambda: "Pick up the cube" in rehearsal.log, "the policy node to be configured")
        assert rehearsal.stop(number) == 128 + number
        assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in rehearsal.log
