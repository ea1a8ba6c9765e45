# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning node: its parameters, and a run over DDS."""

from pathlib import Path

import yaml
from dataset_tools import PUSHT, write_dots
from ros_tools import Peer, parameter_arguments, running, wait_for
from std_msgs.msg import String

from clp_ros.core.resources import resource_path
from clp_ros.nodes.finetuning import PARAMETERS
from clp_ros.nodes.topics import LATCHED
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families


def test_the_parameter_file_says_what_the_node_declares() -> None:
    document = yaml.safe_load(resource_path("config/nodes/finetuning.yaml").read_text(encoding="utf-8"))
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}


def test_a_dataset_becomes_a_fine_tuned_checkpoint(peer: Peer, ros_domain: int, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "base_finetuned"
    base.mkdir()
    with quiet():
        families()["smolvla"].make_checkpoint("tiny", base, base, PUSHT, 0)
    given = {"checkpoint": base, "dataset": write_dots(tmp_path / "dots", 8, episodes=1), "device": "cpu"}
    given |= {"steps": 2, "batch_size": 2, "workers": 0, "train": "last=1"}
    statuses = peer.hear_diagnostics("finetuning")
    done = peer.hear(String, "/finetuning/done", LATCHED)
    with running(["-m", "clp_ros.nodes.finetuning", *parameter_arguments(given)], tmp_path / "log.txt") as node:
        wait_for(lambda: done or node.process.poll() is not None, "done", 120)
        assert done, node.log
        assert done[0].data == str(output)
        wait_for(lambda: any(status.message == "done" for status in statuses), "done on /diagnostics")
        assert node.stop() == 0
    assert Checkpoint.open(output).layers == Checkpoint.open(base).layers
    assert "weights are trained" in node.log
