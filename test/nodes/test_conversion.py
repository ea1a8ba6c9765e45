# SPDX-License-Identifier: Apache-2.0
"""The conversion node: its parameters, and runs over DDS."""

import json
from pathlib import Path

import yaml
from ros_tools import Peer, parameter_arguments, running, wait_for
from std_msgs.msg import String

from clp_ros.core.resources import resource_path
from clp_ros.nodes.conversion import PARAMETERS
from clp_ros.nodes.topics import LATCHED


def test_the_parameter_file_says_what_the_node_declares() -> None:
    document = yaml.safe_load(resource_path("config/nodes/conversion.yaml").read_text(encoding="utf-8"))
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}


def test_a_bag_becomes_a_dataset(peer: Peer, ros_domain: int, recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "dataset"
    given = {"bags": [str(recording)], "embodiment": "aloha_bimanual", "output": output, "task": "Move the cube."}
    given |= {"episodes_by": "times:0,1,2", "resize": "64x64", "fps": 10}
    statuses = peer.hear_diagnostics("conversion")
    done = peer.hear(String, "/conversion/done", LATCHED)
    with running(["-m", "clp_ros.nodes.conversion", *parameter_arguments(given)], tmp_path / "log.txt") as node:
        wait_for(lambda: done or node.process.poll() is not None, "done", 120)
        assert done, node.log
        assert done[0].data == str(output)
        wait_for(lambda: any(status.message == "done" for status in statuses), "done on /diagnostics")
        assert node.stop() == 0
    info = json.loads((output / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["fps"]) == (3, 10)
