# SPDX-License-Identifier: Apache-2.0
"""The policy node as users have it: a process of its own, a robot's topics and its services over real DDS."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoint_tools import edit_json
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from policy_tools import ARM, LEFT, RIGHT, SENT_TOPICS, TASK, Driver, Robot, assert_continues, knots, start_node
from ros_tools import NodeProcess, Peer, wait_for
from safetensors.numpy import load_file, save_file
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from clp_ros.core.resources import resource_path
from clp_ros.nodes.policy_settings import PARAMETERS
from clp_ros.robots.embodiment import Embodiment, load_embodiment


@pytest.fixture
def embodiment() -> Embodiment:
    return load_embodiment("aloha_bimanual")


@pytest.fixture
def robot(peer: Peer, embodiment: Embodiment) -> Iterator[Robot]:
    with Robot(peer, embodiment) as robot:
        yield robot


@pytest.fixture
def driver(peer: Peer) -> Driver:
    return Driver(peer)


StartNode = Callable[..., AbstractContextManager[NodeProcess]]


@pytest.fixture
def start(ros_domain: int, tmp_path: Path) -> StartNode:
    return partial(start_node, tmp_path)


def seconds(message: JointTrajectory) -> list[float]:
    return [point.time_from_start.sec + point.time_from_start.nanosec / 1e9 for point in message.points]


def test_an_active_node_sends_trajectories_and_only_an_active_one(
    start: StartNode, driver: Driver, robot: Robot, embodiment: Embodiment
) -> None:
    with start() as node:
        assert driver.state == "unconfigured"
        driver.expect_quiet()
        assert driver.change(Transition.TRANSITION_CONFIGURE)
        driver.expect_quiet()
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()
        # In the first 200 ms there is no point, however many chunks come by then.
        wait_for(lambda: all(len(driver.sent[topic]) > 15 for topic in SENT_TOPICS), "chunks")
        for topic, positions, names in (
            (SENT_TOPICS[0], LEFT, ARM),
            (SENT_TOPICS[1], LEFT, ["left_finger"]),
            (SENT_TOPICS[2], RIGHT, ARM),
            (SENT_TOPICS[3], RIGHT, ["left_finger"]),
        ):
            message = next(one for one in reversed(driver.sent[topic]) if len(one.points) > 50)  # no stop
            assert message.joint_names == names
            made = message.header.stamp.sec + message.header.stamp.nanosec / 1e9
            assert time.time() - 5 < made < time.time()
            times = np.array(seconds(message))
            assert 0 < times[0] <= 0.04
            np.testing.assert_allclose(np.diff(times), 0.02, atol=1e-9)
            # 100 steps, less what has passed, and some to come to rest; and 0.14 s before the message was made.
            assert 1.8 < times[-1] < 2.8
            sent = np.array([point.positions for point in message.points])
            speeds = np.array([point.velocities for point in message.points])
            assert not speeds[-1].any()
            if names == ARM:
                np.testing.assert_allclose(sent, np.tile([positions[name] for name in ARM], (len(sent), 1)), atol=1e-6)
            else:  # opening, in metres
                assert sent[-1, 0] == pytest.approx(0.058, abs=5e-4)  # at its limit, smoothed
                back = np.maximum.accumulate(sent[30:, 0]) - sent[30:, 0]
                assert back.max() < 2e-4  # the limit stops it, from which it recoils a little
            assert all(not point.accelerations and not point.effort for point in message.points)
        values = driver.expect_status(DiagnosticStatus.OK, "active")
        assert values["instruction"] == TASK
        assert int(values["chunks"]) > 0
        assert 10 < float(values["/cam_high/color/image_rect_raw/compressed rate (Hz)"]) < 60
        assert float(values["image to trajectory p99 (ms)"]) >= float(values["inference p50 (ms)"]) > 0

        assert driver.change(Transition.TRANSITION_DEACTIVATE)
        driver.expect_quiet()
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()
        assert driver.change(Transition.TRANSITION_DEACTIVATE)
        assert driver.change(Transition.TRANSITION_CLEANUP)
        assert driver.state == "unconfigured"
        driver.up()
        driver.expect_chunks()
        assert node.stop() == 0


def test_a_real_checkpoint_drives_the_robot(
    start: StartNode, driver: Driver, robot: Robot, embodiment: Embodiment, tiny_checkpoint: Path
) -> None:
    command = ("-m", "clp_ros.nodes.policy")
    # Random weights give random steps: what is sent stays inside the limits, however far from them that is.
    given = {"checkpoint": tiny_checkpoint, "task": "fold_shorts", "device": "cpu", "max_latency": 30.0}
    with start(command, **given, max_deviation=100.0) as node:
        driver.up()
        driver.expect_chunks()
        for controller in embodiment.controllers.values():
            for message in driver.sent[controller.topic]:
                positions = np.array([point.positions for point in message.points])
                assert positions.shape[1] == len(controller.joints)
                assert np.isfinite(positions).all()
                for joint, column in zip(controller.joints, positions.T, strict=True):
                    assert joint.lower <= column.min() <= column.max() <= joint.upper
        assert driver.change(Transition.TRANSITION_DEACTIVATE)
        assert driver.change(Transition.TRANSITION_CLEANUP)
        assert node.stop(signal.SIGTERM) == 0
        assert "Traceback" not in node.log


def test_the_policy_computes_with_the_threads_that_it_is_given(start: StartNode, driver: Driver, robot: Robot) -> None:
    with start(task="count threads", threads=3) as node:  # a process has one by the environment, see ros_tools
        driver.up()
        driver.expect_chunks()
        assert "torch computes with 3 threads" in node.log
        assert "the policy's thread has 3 threads of torch" in node.log


def test_a_clock_that_never_came_is_named(start: StartNode, driver: Driver, robot: Robot) -> None:
    with start(use_sim_time=True, activate_timeout=1.0) as node:
        assert driver.change(Transition.TRANSITION_CONFIGURE)
        assert not driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_status(DiagnosticStatus.ERROR, "not activated", "no time on /clock", "use_sim_time")
        assert "different clocks" not in node.log


def test_an_input_that_never_came_is_named(
    start: StartNode, driver: Driver, robot: Robot, embodiment: Embodiment
) -> None:
    topic = embodiment.joint_states["follower_left"].topic
    robot.spoil = {topic: lambda message: False}
    with start(activate_timeout=1.0) as node:
        assert driver.change(Transition.TRANSITION_CONFIGURE)
        assert not driver.change(Transition.TRANSITION_ACTIVATE)
        assert driver.state == "inactive"
        driver.expect_status(DiagnosticStatus.ERROR, "not activated", topic, "no message yet")
        assert "not activated" in node.log
        assert driver.count == 0
        robot.spoil = {}
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()


def test_a_stop_while_the_node_waits_for_its_inputs_lasts(
    start: StartNode, driver: Driver, robot: Robot, embodiment: Embodiment, peer: Peer
) -> None:
    robot.spoil = {embodiment.joint_states["follower_left"].topic: lambda message: False}
    with start(activate_timeout=30.0):
        assert driver.change(Transition.TRANSITION_CONFIGURE)
        activate = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_ACTIVATE))
        activating = peer.start_call(ChangeState, "/policy/change_state", activate)
        time.sleep(0.5)
        assert not activating.done()
        assert peer.call(Trigger, "/policy/stop").success
        robot.spoil = {}
        wait_for(activating.done, "the end of activating")
        assert not activating.result().success
        assert driver.state == "inactive"
        driver.expect_status(DiagnosticStatus.WARN, "stopped by ~/stop")
        driver.expect_quiet()
        assert driver.count == 0
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()


# Other ends: test_faults.py::test_stop_and_deactivate_brake_within_one_control_step.
@pytest.mark.parametrize("end", ["shutdown", signal.SIGINT, signal.SIGTERM])
def test_splices_are_continuous_in_position_and_velocity_to_the_end(
    start: StartNode, driver: Driver, robot: Robot, end: str | signal.Signals
) -> None:
    with start(task="turn both waists", max_deviation=1.0) as node:
        driver.up()
        received = driver.sent[SENT_TOPICS[0]]
        # In motion, that is with a chunk and not with a stop: on a busy machine an input may have been late.
        wait_for(lambda: len(received) > 15 and len(received[-1].points) > 50, "chunks")
        if end == "shutdown":
            assert driver.change(Transition.TRANSITION_ACTIVE_SHUTDOWN)
        else:
            assert node.stop(end) == 0
            assert "Traceback" not in node.log
            assert "rror" not in node.log
        time.sleep(0.3)
    # There is no point in the first 200 ms, however many chunks come by then.
    began = knots(received[0])[0][0]
    for before, message in pairwise(message for message in received if knots(message)[0][0] > began):
        assert_continues(message, before)
    assert np.abs(knots(received[-2])[2]).max() > 0.05
    # The last brakes at once.
    times, _, speeds = knots(received[-1])
    assert (times[-2] - times[0]) / 1e9 < 0.2
    assert np.abs(speeds[0]).max() > 1e-4


def test_after_too_many_faults_the_node_is_unconfigured_and_can_start_anew(
    start: StartNode, driver: Driver, robot: Robot
) -> None:
    with start(max_faults=5) as node:
        driver.up()
        driver.expect_chunks()
        driver.set_task("please raise")
        wait_for(lambda: driver.state == "unconfigured", "the error state to have been passed")
        driver.expect_status(DiagnosticStatus.ERROR, "gave up: 5 faults since the activation", "KeyError")
        driver.expect_quiet()
        assert "giving up" in node.log
        assert "Traceback" not in node.log
        driver.up()
        driver.expect_chunks()
        assert node.stop() == 0


def test_deactivate_and_stop_drop_a_chunk_that_is_being_made(
    start: StartNode, driver: Driver, robot: Robot, peer: Peer
) -> None:
    with start(task="please be slow", max_latency=10.0):
        driver.up()
        driver.expect_chunks()
        assert driver.change(Transition.TRANSITION_DEACTIVATE)
        time.sleep(0.3)  # the stop itself
        before = driver.count
        time.sleep(2)
        assert driver.count == before
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()
        response = peer.call(Trigger, "/policy/stop")
        assert response.success, response.message
        time.sleep(0.3)
        before = driver.count
        time.sleep(2)
        assert driver.count == before
        values = driver.expect_status(DiagnosticStatus.WARN, "stopped")
        assert int(values["dropped deactivated"]) >= 1
        # Latched: only a new activation ends it.
        assert driver.change(Transition.TRANSITION_DEACTIVATE)
        assert driver.change(Transition.TRANSITION_ACTIVATE)
        driver.expect_chunks()


def test_replan_steps_and_rate_bound_the_number_of_chunks(start: StartNode, driver: Driver, robot: Robot) -> None:
    with start(replan_steps=20):  # 0.4 s at 50 Hz; by default ten steps, fold_shorts' execution length
        driver.up()
        driver.expect_chunks()
        before, began = len(driver.sent[SENT_TOPICS[0]]), time.monotonic()
        time.sleep(3)
        rate = (len(driver.sent[SENT_TOPICS[0]]) - before) / (time.monotonic() - began)
        assert rate < 1 / 0.4 + 0.5


def test_a_dry_run_sends_to_preview_only(start: StartNode, driver: Driver, robot: Robot, peer: Peer) -> None:
    preview = peer.hear(JointTrajectory, "/policy/preview", 50)
    with start(dry_run=True):
        driver.up()
        wait_for(lambda: len(preview) > 8, "trajectories on ~/preview")
        assert driver.count == 0
        assert {message.header.frame_id for message in preview} == {
            "left_arm",
            "left_gripper",
            "right_arm",
            "right_gripper",
        }


def test_a_bad_task_is_refused_and_the_old_one_stays(start: StartNode, driver: Driver, robot: Robot) -> None:
    with start() as node:
        driver.up()
        for bad in ("", "fold_short", "Put the {object} in the bin.", "~no_such_user/task.yaml"):
            driver.set_task(bad)
            time.sleep(1.2)
        wait_for(lambda: "did you mean 'fold_shorts'?" in node.log, "the refusal")
        for why in ("the task is empty", "is not an instruction", "no such file"):
            assert why in node.log
        assert driver.expect_status(DiagnosticStatus.OK, "active")["instruction"] == TASK
        driver.set_task("fly_towel")
        wait_for(lambda: "towel" in driver.statuses[-1].values["instruction"], "the new task")


def test_wrong_parameters_are_refused_with_one_line(
    start: StartNode, driver: Driver, peer: Peer, tmp_path: Path
) -> None:
    right = {"checkpoint": str(tmp_path), "embodiment": "aloha_bimanual", "task": TASK}
    right |= {"replan_steps": 0, "max_latency": 1.0, "rate_hz": 0.0, "mode": "replace", "send_lead_time": 0.02}
    right |= {"max_deviation": 0.05, "input_timeout": 0.3}
    with start() as node:
        for wrong, words in (
            ({"checkpoint": ""}, "the parameter checkpoint is empty"),
            ({"embodiment": "aloha_bimanul"}, "did you mean 'aloha_bimanual'?"),
            ({"embodiment": ""}, "the parameter embodiment is empty"),
            ({"task": "fold_shirts"}, "unknown task 'fold_shirts'"),
            ({"replan_steps": 101}, "the policy's chunks have 100"),
            ({"replan_steps": -2}, "replan_steps is -2"),
            ({"max_latency": -1.0}, "max_latency is -1.0"),
            ({"rate_hz": float("nan")}, "rate_hz is nan"),
            ({"mode": "replac"}, "did you mean 'replace'?"),
            ({"send_lead_time": -0.1}, "send_lead_time is -0.1"),
            ({"max_deviation": 0.0}, "max_deviation is 0.0"),
            ({"input_timeout": 0.0}, "input_timeout is 0.0"),
        ):
            assert not any(peer.set_parameters("/policy", **(right | wrong)))
            assert not driver.change(Transition.TRANSITION_CONFIGURE)
            assert driver.state == "unconfigured"
            lines = [line for line in node.log.splitlines() if "not configured" in line]
            assert words in lines[-1]
            assert driver.expect_status(DiagnosticStatus.ERROR, "unconfigured")[""].endswith(
                lines[-1].split(": ", 2)[-1]
            )
        assert len(lines) == 12
        assert "Traceback" not in node.log
        assert not any(peer.set_parameters("/policy", **right))
        assert driver.change(Transition.TRANSITION_CONFIGURE)


def test_an_unknown_parameter_is_refused(start: StartNode, driver: Driver) -> None:
    with start(replan_step=3) as node:
        assert not driver.change(Transition.TRANSITION_CONFIGURE)
        assert "policy: unknown parameter 'replan_step' (hint: did you mean 'replan_steps'?)" in node.log


def test_a_wrong_parameter_can_be_set_right_and_only_then(
    start: StartNode, driver: Driver, robot: Robot, peer: Peer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spoiled = shutil.copytree(tiny_checkpoint, tmp_path / "spoiled")
    (statistics,) = spoiled.glob("policy_postprocessor_*.safetensors")
    tensors = load_file(statistics)
    tensors["action.mean"][0] = np.nan
    save_file(tensors, statistics)
    raw = shutil.copytree(tiny_checkpoint, tmp_path / "raw")
    for file in raw.glob("policy_*.safetensors"):
        save_file({f"so100.buffer.{name}": tensor for name, tensor in load_file(file).items()}, file)
    # As lerobot-train leaves it: the features of the base model it started from.
    tuned = shutil.copytree(tiny_checkpoint, tmp_path / "tuned")
    inputs = json.loads((tuned / "config.json").read_text())["input_features"]
    inputs["observation.state"]["shape"] = [6]
    inputs["observation.images.camera9"] = {"type": "VISUAL", "shape": [3, 64, 64]}
    edit_json("config.json", lambda config: config.update(input_features=inputs))(tuned)
    given = {"checkpoint": "/nowhere/at_all", "max_latency": 30.0, "max_deviation": 100.0}
    with start(("-m", "clp_ros.nodes.policy"), **given) as node:
        assert not driver.change(Transition.TRANSITION_CONFIGURE)
        for wrong, words in (
            (spoiled, "the statistic 'action.mean' is not finite"),
            (raw, "no statistics for observation.state and action: lerobot uses raw values"),
        ):
            assert peer.set_parameters("/policy", checkpoint=str(wrong)) == [""]
            assert not driver.change(Transition.TRANSITION_CONFIGURE)
            driver.expect_status(DiagnosticStatus.ERROR, words)
        assert "Traceback" not in node.log
        assert peer.set_parameters("/policy", checkpoint=str(tuned)) == [""]
        driver.up()
        assert "the camera observation.images.camera9 is left out: aloha_bimanual does not have it" in node.log
        driver.expect_chunks()
        (reason,) = peer.set_parameters("/policy", replan_steps=3)
        assert "clean it up first" in reason


def test_a_parameter_of_a_wrong_type_ends_the_start_with_one_line(start: StartNode) -> None:
    with start(rate_hz="fast") as node:
        assert node.process.wait(60) == 1
        (line,) = node.log.strip().splitlines()
        assert "rate_hz" in line


def test_an_unexpected_failure_goes_through_error_processing(
    start: StartNode, driver: Driver, robot: Robot, peer: Peer, tmp_path: Path
) -> None:
    with start(checkpoint=tmp_path / "broken") as node:
        assert not driver.change(Transition.TRANSITION_CONFIGURE)
        assert driver.state == "unconfigured"
        assert "not a fault of the user's" in node.log
        assert peer.set_parameters("/policy", checkpoint=str(tmp_path)) == [""]
        driver.up()
        driver.expect_chunks()


def test_transitions_that_do_not_exist_are_refused(start: StartNode, driver: Driver) -> None:
    with start():
        assert not driver.change(Transition.TRANSITION_ACTIVATE)
        assert driver.change(Transition.TRANSITION_CONFIGURE)
        assert not driver.change(Transition.TRANSITION_CONFIGURE)
        assert driver.change(Transition.TRANSITION_INACTIVE_SHUTDOWN)
        assert driver.state == "finalized"


def test_services_answer_while_the_policy_is_being_loaded(
    start: StartNode, driver: Driver, peer: Peer, tmp_path: Path
) -> None:
    with start(checkpoint=tmp_path / "slow"):
        assert driver.state == "unconfigured"
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        future = peer.start_call(ChangeState, "/policy/change_state", request)
        driver.expect_status(DiagnosticStatus.OK, "loading the policy")
        assert driver.state == "configuring"
        assert peer.parameter("/policy", "task") == TASK
        assert not peer.call(Trigger, "/policy/stop").success
        assert not future.done()
        assert wait_for(future.done, "the transition")
        assert future.result().success


# While it drives: test_splices_are_continuous_in_position_and_velocity_to_the_end.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_policy_is_loaded_ends_the_process_cleanly(
    start: StartNode, driver: Driver, peer: Peer, tmp_path: Path, number: int
) -> None:
    with start(checkpoint=tmp_path / "slow") as node:
        driver.expect_status(DiagnosticStatus.OK, "unconfigured")
        request = ChangeState.Request(transition=Transition(id=Transition.TRANSITION_CONFIGURE))
        peer.start_call(ChangeState, "/policy/change_state", request)
        driver.expect_status(DiagnosticStatus.OK, "loading the policy")
        assert node.stop(number) == 0
        assert "Traceback" not in node.log
        assert "rror" not in node.log


def test_the_parameter_file_has_every_parameter_at_its_default() -> None:
    text = resource_path("config/nodes/policy.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["/**"]["ros__parameters"] == {name: value for name, (value, _) in PARAMETERS.items()}
