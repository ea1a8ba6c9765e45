# SPDX-License-Identifier: Apache-2.0
"""The calibration node as users have it: a process of its own, fed by a bag or by another process's topics."""

import json
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from ros_tools import NodeProcess, Peer, Status, parameter_arguments, running, wait_for
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float64MultiArray, Header, String
from std_srvs.srv import Trigger

from clp_ros.calibration.calibration_file import Calibration
from clp_ros.core.resources import resource_path
from clp_ros.messages.images import decode_image
from clp_ros.nodes.calibration import PARAMETERS
from clp_ros.nodes.messages import matrix_from_message
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import load_embodiment

BAG = resource_path("rosbags/aloha_bimanual")
MODULES = ("vlm", "expert")
StartNode = Callable[..., AbstractContextManager[NodeProcess]]


@pytest.fixture
def start(ros_domain: int, tmp_path: Path) -> StartNode:
    def start(**parameters: Any) -> AbstractContextManager[NodeProcess]:
        parameters = {"embodiment": "aloha_bimanual", "task": "transfer_cube", "device": "cpu"} | parameters
        command = ["-m", "clp_ros.nodes.calibration", *parameter_arguments(parameters)]
        return running(command, tmp_path / "log.txt")

    return start


@pytest.fixture
def replay(ros_domain: int, tmp_path: Path) -> Callable[..., AbstractContextManager[NodeProcess]]:
    """Plays the recorded demonstration from another process."""

    def replay(*options: str) -> AbstractContextManager[NodeProcess]:
        return running(["-m", "clp_ros.nodes.replay", str(BAG), *options], tmp_path / "replay.txt")

    return replay


def seen(statuses: list[Status], message: str, level: bytes = DiagnosticStatus.OK) -> list[Status]:
    return [status for status in statuses if message in status.message and status.level == level]


def check_topics(peer: Peer, folder: Path) -> None:
    """Checks that a subscriber who comes now gets a calibration's matrices and pictures."""
    calibration = Calibration.load(folder)
    assert set(calibration.matrices) == set(MODULES)
    matrices = {name: peer.hear(Float64MultiArray, f"/calibration/cka/{name}", LATCHED) for name in MODULES}
    pictures = {name: peer.hear(Image, f"/calibration/heatmap/{name}", LATCHED) for name in MODULES}
    for name in MODULES:
        (message,) = wait_for(lambda name=name: matrices[name], f"the matrix of {name}")
        assert np.array_equal(matrix_from_message(message), calibration.matrices[name])
        layers = len(calibration.matrices[name])
        assert [(axis.label, axis.size) for axis in message.layout.dim] == [("layer", layers)] * 2
        (picture,) = wait_for(lambda name=name: pictures[name], f"the heatmap of {name}")
        png = CompressedImage(format="png", data=(folder / f"heatmap_{name}.png").read_bytes())
        assert np.array_equal(decode_image(picture), decode_image(png))


def test_the_parameter_file_says_what_the_node_declares() -> None:
    document = yaml.safe_load(resource_path("config/nodes/calibration.yaml").read_text(encoding="utf-8"))
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}


def test_a_bag_becomes_a_folder_and_topics_while_the_node_answers(
    peer: Peer, start: StartNode, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calibration"
    statuses = peer.hear_diagnostics("calibration")
    done = peer.hear(String, "/calibration/done", LATCHED)
    # A process has one thread by the environment, see ros_tools.
    with start(checkpoint=tiny_checkpoint, bag=BAG, samples=40, output=output, threads=2) as node:
        # Everything answers while the policy is loaded and while frames go through it.
        answers = 0
        while not done:
            assert peer.parameter("/calibration", "samples") == 40
            answers += 1
            assert node.process.poll() is None, node.log
        assert answers > 10
        assert done[0].data == str(output)
        progress = [status.values for status in seen(statuses, "calibrating") if "done" in status.values]
        assert progress, [status.message for status in statuses]
        assert all(0 <= int(values["done"]) <= int(values["total"]) == 40 for values in progress)
        assert any(int(values["done"]) > 0 for values in progress)
        wait_for(lambda: seen(statuses, "done"), "done on /diagnostics")
        assert not [status for status in statuses if status.level != DiagnosticStatus.OK]
        assert sorted(path.name for path in output.iterdir()) == [
            "calibration.json",
            "cka.npz",
            "heatmap_expert.png",
            "heatmap_vlm.png",
            "report.html",
        ]
        check_topics(peer, output)
        assert "torch computes with 2 threads" in node.log
        late = peer.hear(String, "/calibration/done", LATCHED)
        assert wait_for(lambda: late, "done, for one who comes late") == done
        (reason,) = peer.set_parameters("/calibration", samples=3)
        assert reason
        response = peer.call(Trigger, "/calibration/finish")
        assert not response.success
        assert "does not listen" in response.message
        assert node.stop() == 0
        assert "Traceback" not in node.log


def test_live_topics_are_calibrated_on_once_they_fall_silent(
    peer: Peer, start: StartNode, replay: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calibration"
    statuses = peer.hear_diagnostics("calibration")
    done = peer.hear(String, "/calibration/done", LATCHED)
    given = {"checkpoint": tiny_checkpoint, "samples": 6, "output": output, "idle_timeout": 3.0, "use_sim_time": True}
    given["statistics"] = "bags"
    camera = next(iter(load_embodiment("aloha_bimanual").cameras.values())).topic
    with start(**given) as node:
        wait_for(lambda: seen(statuses, "listening"), "listening")
        # A player's messages may come before its clock.
        early = peer.node.create_publisher(CompressedImage, camera, 1)
        wait_for(early.get_subscription_count, "the node's camera topic")
        early.publish(CompressedImage(header=Header(stamp=Time(sec=1_700_000_000))))
        with replay("--rate", "2", "--clock"):
            wait_for(lambda: done, "the folder")
        assert node.process.poll() is None
        document = json.loads((output / "calibration.json").read_text(encoding="utf-8"))
        assert document["samples"] == 6
        assert document["bags"] == []
        # Once all topics are there, messages keep up with the replay: hardly a control tick lacks an input.
        assert document["live"]["usable_ticks"] > 3 * sum(document["live"]["unusable_ticks"].values())
        assert document["statistics"]["source"] == "bags"
        assert document["statistics"]["steps"] == document["live"]["usable_ticks"]
        assert "the checkpoint's own statistics are not used, but those given" in node.log
        assert set(document["live"]["messages"]) == set(load_embodiment("aloha_bimanual").topics)
        check_topics(peer, output)
        assert node.stop(signal.SIGTERM) == 0
        assert "Traceback" not in node.log


def test_finish_ends_the_listening_but_not_before_the_first_frame(
    peer: Peer, start: StartNode, replay: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calibration"
    statuses = peer.hear_diagnostics("calibration")
    with start(checkpoint=tiny_checkpoint, samples=3, output=output, idle_timeout=1000.0):
        wait_for(lambda: seen(statuses, "listening"), "listening")
        response = peer.call(Trigger, "/calibration/finish")
        assert not response.success
        assert "no frame" in response.message
        with replay("--loop"):

            def drawn() -> bool:
                listening = seen(statuses, "listening")
                return int(listening[-1].values.get("done", "0")) == 3

            wait_for(drawn, "three frames")
            response = peer.call(Trigger, "/calibration/finish")
            assert response.success, response.message
            assert "3 frames" in response.message
            response = peer.call(Trigger, "/calibration/finish")
            assert not response.success
            assert "does not listen" in response.message
            wait_for(lambda: seen(statuses, "done"), "done on /diagnostics")
        assert Calibration.load(output).meta["samples"] == 3


def test_sigint_ends_the_calibrating_and_leaves_nothing_behind(
    peer: Peer, start: StartNode, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    statuses = peer.hear_diagnostics("calibration")
    folder = tmp_path / "results"
    folder.mkdir()
    with start(checkpoint=tiny_checkpoint, bag=BAG, samples=100_000, output=folder / "calibration") as node:
        wait_for(lambda: seen(statuses, "calibrating") and "done" in statuses[-1].values, "progress")
        assert node.stop(signal.SIGINT, timeout=20) == 0
        assert list(folder.iterdir()) == []
        assert "Traceback" not in node.log


def test_sigint_ends_the_scanning(peer: Peer, start: StartNode, tiny_checkpoint: Path, tmp_path: Path) -> None:
    statuses = peer.hear_diagnostics("calibration")
    bags = json.dumps([str(BAG)] * 60)  # a long time of scanning
    with start(checkpoint=tiny_checkpoint, bag=bags, samples=4, output=tmp_path / "calibration") as node:
        wait_for(lambda: seen(statuses, "scanning") and "done" in statuses[-1].values, "progress")
        assert node.stop(signal.SIGINT, timeout=20) == 0
        assert not seen(statuses, "calibrating")
        assert not (tmp_path / "calibration").exists()
        assert "Traceback" not in node.log


def test_sigterm_ends_the_listening(peer: Peer, start: StartNode, tiny_checkpoint: Path, tmp_path: Path) -> None:
    statuses = peer.hear_diagnostics("calibration")
    with start(checkpoint=tiny_checkpoint, output=tmp_path / "calibration") as node:
        wait_for(lambda: seen(statuses, "listening"), "listening")
        assert node.stop(signal.SIGTERM, timeout=20) == 0
        assert not (tmp_path / "calibration").exists()
        assert "Traceback" not in node.log


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({}, "the parameter checkpoint is empty"),
        ({"checkpoint": "nowhere"}, "the checkpoint folder does not exist"),
        ({"checkpoint": "TINY", "embodiment": "aloha"}, "unknown embodiment"),
        ({"checkpoint": "TINY", "task": "fly_away"}, "unknown task"),
        ({"checkpoint": "TINY", "output": "FULL"}, "the output folder is not empty"),
        ({"checkpoint": "TINY", "bag": "['', 'nowhere']"}, "nowhere"),
        ({"checkpoint": "TINY", "seed": -1}, "seed must be at least 0, not -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_reported_and_the_node_keeps_running(
    peer: Peer, start: StartNode, tiny_checkpoint: Path, tmp_path: Path, parameters: dict[str, Any], fault: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    meant = {"TINY": tiny_checkpoint, "FULL": tmp_path / "full"}
    parameters = {"output": tmp_path / "calibration"} | {
        name: meant.get(value, value) if isinstance(value, str) else value for name, value in parameters.items()
    }
    statuses = peer.hear_diagnostics("calibration")
    with start(**parameters) as node:
        wait_for(lambda: seen(statuses, fault, DiagnosticStatus.ERROR), f"{fault!r} on /diagnostics")
        assert peer.parameter("/calibration", "samples") == 64
        assert node.log.count("[ERROR]") == 1
        assert fault in node.log
        assert not (tmp_path / "calibration").exists()
        assert node.stop() == 0
        assert "Traceback" not in node.log


def test_a_wrongly_typed_parameter_ends_it_with_one_line(start: StartNode) -> None:
    with start(samples="many") as node:
        assert node.process.wait(60) == 1
        assert node.log.count("\n") == 1
        assert "samples" in node.log
