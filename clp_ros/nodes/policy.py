# SPDX-License-Identifier: Apache-2.0
"""The policy node: a robot's camera and joint topics in, one JointTrajectory a controller and chunk out.

A managed node. Configuring loads the checkpoint and starts to listen; activating waits until every input is alive; only
an active node sends; deactivating, ~/stop, and every fault (see clp_ros.control.runner) brake the robot to rest.

Which thread runs what: the listener's takes in images and joint states, and decodes none; the executor's one thread
runs services, timers and the other topics, and never waits for the policy; a thread of its own runs each transition;
the runner's worker alone runs the policy and publishes. One thread, because rclpy's multi-threaded executor takes
several times as much of the interpreter's time a wake-up, which then is not there for decoding and publishing.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rclpy.time import Time
from std_msgs.msg import Float64, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from clp_ros.control.fault_handler import LOG_AGAIN_S
from clp_ros.control.inputs import LiveInputs
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.runner import ChunkRunner
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.core.threads import set_threads
from clp_ros.nodes import policy_settings as settings
from clp_ros.nodes.compat import given_parameters
from clp_ros.nodes.controllers import ControllerNodes
from clp_ros.nodes.diagnostics import Diagnostics, Level, Report
from clp_ros.nodes.joint_trajectory import serialized_joint_trajectory
from clp_ros.nodes.latched import LatchedStates
from clp_ros.nodes.lifecycle import REFUSALS, BusyError, ManagedNode
from clp_ros.nodes.listener import Listener, published_otherwise
from clp_ros.nodes.messages import INPUT_TYPES
from clp_ros.nodes.parameters import checkpoint_folder, declare, given_embodiment
from clp_ros.nodes.policy_report import report_values
from clp_ros.nodes.robot_description import RobotDescriptions
from clp_ros.nodes.spin import main as run_node
from clp_ros.nodes.topics import sensor_input
from clp_ros.policies.compilation import compile_policy
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.task import load_task
from clp_ros.robots.trajectory import Trajectory

# How long a running inference is waited for when the node is cleaned up or ends.
_CLOSE_S = 30.0
_NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
_THROTTLE_S = LOG_AGAIN_S
# How long the controllers are given to acknowledge the last message.
_ACKNOWLEDGED_S = 0.2
# How often activating looks at the inputs.
_POLL_S = 0.05

LoadPolicy = Callable[[Path, str], Any]


def _load_policy(folder: Path, device: str) -> Any:
    from clp_ros.policies.lerobot_policy import (
        load_policy,  # torch and lerobot: seconds, and only a node that runs needs them
    )

    policy = load_policy(folder, device)
    policy.check_normalised()
    # While nothing moves yet: the first chunk takes several times as long as the next, and OpenCV takes long to import.
    policy.warm_up()
    importlib.import_module("cv2")
    return policy


class EndedError(Exception):
    """A signal ended ROS while the policy was being loaded."""


class PolicyNode(ManagedNode):
    """See the module's text; config/nodes/policy.yaml explains the parameters.

    Args:
        load: From the checkpoint's folder and the device to a policy with the interface of
            :class:`clp_ros.policies.lerobot_policy.LoadedPolicy`: ``chunk_size``, ``check_features`` and
            ``predict_chunk``.

    Attributes:
        runner: The loop, while the node is configured.
    """

    def __init__(self, load: LoadPolicy = _load_policy) -> None:
        super().__init__("policy")
        declare(self, settings.PARAMETERS, read_only=False)
        settings.declare_old(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        self._load = load
        self._embodiment: Embodiment | None = None
        self._inputs: LiveInputs | None = None
        self.runner: ChunkRunner | None = None
        self._controllers: ControllerNodes | None = None
        self._listener: Listener | None = None
        self._tasks: Subscription | None = None
        self._sending: dict[str, Any] = {}
        self._fault: str | None = None
        self._failed = False
        self.create_service(Trigger, "~/stop", self._stop)
        self._diagnostics = Diagnostics(self, self._report)

    # ------------------------------------------------------------------------------------------------ lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Reads the parameters, loads the policy, checks that it fits the robot, and listens to the inputs."""
        self._fault = None
        try:
            self._set_up()
        except EndedError:
            return TransitionCallbackReturn.FAILURE
        except ClpError as error:
            self.release()
            self._fault = str(error)
            self.get_logger().error(f"not configured: {error}")
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Starts sending, and ends a stop that was before, once every input is alive."""
        self._fault = None
        self.runner.clear_stop()
        if not self._wait_for_inputs():
            return TransitionCallbackReturn.FAILURE
        try:
            controllers = self._controllers.check(lambda: self.runner.stopped or not self.context.ok())
        except ClpError as error:
            self._fault = str(error)
            self.get_logger().error(f"not activated: {error}")
            return TransitionCallbackReturn.FAILURE
        result = super().on_activate(state)
        speed = self._embodiment.speed_scaling
        if speed is not None and self.runner.speed_scaling is None:
            self.get_logger().info(f"{speed.topic} is not published: the robot is taken to move at full speed")
        from_measured = [name for name, facts in controllers.items() if facts.from_desired is False]
        if not self.runner.activate(from_measured):  # stopped meanwhile
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        return result

    def _wait_for_inputs(self) -> bool:
        """Waits until every input is alive; returns whether it is, and logs what is missing where time is up."""
        deadline = time.monotonic() + self.get_parameter("activate_timeout").value
        latched = LatchedStates(self, self._embodiment, partial(self._receive, self._inputs))
        try:
            while missing := self._inputs.missing(self._now_ns()):
                if self.runner.stopped or not self.context.ok():
                    return False
                if time.monotonic() > deadline:
                    kinds = self._embodiment.topics
                    if self._now_ns() == 0:
                        self._fault = (
                            "no time on /clock, which use_sim_time asks for: publish it (ros2 bag play --clock)"
                        )
                    else:
                        advice = (published_otherwise(self, one.topic, kinds) or latched.advice(one) for one in missing)
                        self._fault = "; ".join(map("{}{}".format, missing, advice))
                    self.get_logger().error(f"not activated: {self._fault}")
                    return False
                for one in missing:
                    latched.take(one.topic)
                time.sleep(_POLL_S)
        finally:
            latched.close()
        return True

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brakes the robot to rest; nothing is sent any more when this returns."""
        self.runner.deactivate()
        result = super().on_deactivate(state)
        return TransitionCallbackReturn.ERROR if self._failed else result

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Frees the policy and all that configuring made."""
        result = super().on_cleanup(state)
        self.release()
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As cleaning up, from any state."""
        self.brake()
        result = super().on_shutdown(state)
        self.release()
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Frees everything; the node is unconfigured then, and can be configured again."""
        result = super().on_error(state)
        self._failed = False
        self.release()
        return result

    def failed(self, error: BaseException) -> None:
        """Shows an unexpected exception of a transition on /diagnostics."""
        self._fault = f"{type(error).__name__}: {error}"

    def brake(self) -> None:
        """Brakes the robot to rest, if it is driven, and waits until the controllers have received that."""
        runner, publishers = self.runner, set(self._sending.values())  # a transition may take both away meanwhile
        if runner is not None:
            runner.deactivate()
            for publisher in publishers:
                with suppress(InvalidHandle):
                    publisher.wait_for_all_acked(Duration(seconds=_ACKNOWLEDGED_S))

    # ------------------------------------------------------------------------------------------------ configuring

    def _set_up(self) -> None:
        self._check_names()
        checkpoint = checkpoint_folder(self)
        embodiment = given_embodiment(self)
        task = load_task(self._given("task", "a name under config/tasks, or an instruction"), embodiment)
        self.get_logger().info(f"loading {checkpoint}")
        if (threads := set_threads(settings.threads(self))) is not None:  # before anything computes
            self.get_logger().info(f"torch computes with {threads} threads")
        import cv2  # noqa: F401 - takes a second, which the first image would have to wait

        self._controllers = ControllerNodes(self, embodiment)  # discovered while the policy is loaded
        with RobotDescriptions(self, embodiment) as descriptions:  # heard while the policy is loaded
            policy = self._load(checkpoint, self.get_parameter("device").value)
            embodiment = descriptions.narrow()
        if not self.context.ok():
            raise EndedError
        slots = [camera.feature for camera in embodiment.cameras.values()]
        for note in policy.check_features(slots, embodiment.action_size, embodiment.name) or ():
            self.get_logger().warning(note)
        replan = settings.replan_config(self, task, policy.chunk_size)
        schedule, watchdog = settings.schedule(self), settings.watchdog_config(self)
        if self.get_parameter("compile").value:
            if schedule.mode == "rtc":
                raise ClpError(
                    "a compiled policy cannot continue its last chunk",
                    where="policy",
                    fix="set mode to replace or ensemble, or compile to false",
                )
            self.get_logger().info("compiling the denoising step")
            compile_policy(policy, task.instruction, cuda_graphs=False)  # the worker's thread cannot replay graphs
        if schedule.mode == "rtc":
            policy.enable_rtc(replan.replan_steps or task.execution_length)
        # Else a collection walks half a million objects of a loaded policy's now and then: 0.3 s in which nothing runs.
        gc.collect()
        gc.freeze()
        self._embodiment, self._inputs = embodiment, LiveInputs(embodiment)
        self._advertise(embodiment)
        self.runner = ChunkRunner(
            embodiment,
            self._inputs,
            policy,
            task.instruction,
            replan,
            self._send,
            clock_ns=self._now_ns,
            notify=self._notify,
            schedule=schedule,
            watchdog=watchdog,
            failed=self._fail,
            log=settings.run_log(self),
            processor=self._processor_share(policy),
            serialise=self._serialise,
        )
        self._listen(embodiment)
        self.get_logger().info(f"{embodiment.name}: {task.instruction}")

    def _processor_share(self, policy: Any) -> ProcessorShare | None:
        """None on a GPU: there the thread waits for the GPU."""
        on_cpu = getattr(policy, "device", None) == "cpu"
        return ProcessorShare(partial(self._notify, logging.WARNING)) if on_cpu else None

    def _check_names(self) -> None:
        """Refuses parameters that do not exist: rclpy ignores them, and a misspelt one would do nothing."""
        for name in given_parameters(self):
            if not self.has_parameter(name) and not name.startswith("qos_overrides."):
                raise ClpError(
                    f"unknown parameter {name!r}", where="policy", fix=did_you_mean(name, list(settings.PARAMETERS))
                )

    def _given(self, name: str, fix: str) -> str:
        value = self.get_parameter(name).value
        if not value.strip():
            raise ClpError(f"the parameter {name} is empty", where="policy", fix=f"give {fix}")
        return value

    def _advertise(self, embodiment: Embodiment) -> None:
        topics = [controller.topic for controller in embodiment.controllers.values()]
        if self.get_parameter("dry_run").value:
            # One topic for all controllers: deep enough for a whole chunk.
            preview = self.create_lifecycle_publisher(JointTrajectory, "~/preview", QoSProfile(depth=len(topics)))
            self._sending = dict.fromkeys(topics, preview)
        else:
            self._sending = {
                topic: self.create_lifecycle_publisher(JointTrajectory, topic, QoSProfile(depth=1)) for topic in topics
            }

    def _listen(self, embodiment: Embodiment) -> None:
        topics = {topic: INPUT_TYPES[kind] for topic, kind in embodiment.topics.items()}
        qos = {topic: sensor_input(kind) for topic, kind in embodiment.topics.items()}
        if embodiment.speed_scaling is not None:
            topics[embodiment.speed_scaling.topic] = Float64
            qos[embodiment.speed_scaling.topic] = _NEWEST
        self._listener = Listener(self, topics, qos, partial(self._receive, self._inputs))
        self._tasks = self.create_subscription(String, "~/task", self._set_task, QoSProfile(depth=1))

    def release(self) -> None:
        """Stops sending, ends the worker, and frees the policy. A step that fails does not prevent the others."""
        listener, self._listener = self._listener, None
        tasks, self._tasks = self._tasks, None
        controllers, self._controllers = self._controllers, None
        runner, self.runner = self.runner, None
        sending, self._sending = self._sending, {}
        with ExitStack() as last_first:
            last_first.callback(self._free)
            if controllers is not None:
                last_first.callback(controllers.close)
            for publisher in set(sending.values()):
                last_first.callback(self.destroy_lifecycle_publisher, publisher)
            if runner is not None:
                last_first.callback(self._close, runner)
            if listener is not None:
                last_first.callback(self.destroy_subscription, tasks)
                last_first.callback(listener.close)
            del runner

    def _close(self, runner: ChunkRunner) -> None:
        if not runner.close(_CLOSE_S):
            self.get_logger().error(f"the policy did not end within {_CLOSE_S:g} s; its memory is not freed")

    def _free(self) -> None:
        self._inputs = self._embodiment = None
        if (torch := sys.modules.get("torch")) is not None:
            gc.unfreeze()
            gc.collect()  # a model is full of reference cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------------ running

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _receive(self, inputs: LiveInputs, topic: str, message: Any) -> None:
        try:
            if isinstance(message, Float64):
                if (runner := self.runner) is not None:
                    runner.set_speed_scaling(message.data / 100)
            elif now_ns := self._now_ns():  # 0 with use_sim_time, before the first /clock
                inputs.add(topic, message, now_ns)
        except ClpError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=_THROTTLE_S)

    def _fail(self, why: str) -> None:
        """Goes to the lifecycle's error state, after too many faults."""
        self.get_logger().error(f"giving up: {why}")
        self._fault, self._failed = f"gave up: {why}", True
        try:
            self.exclusively(self.trigger_deactivate)
        except (BusyError, *REFUSALS):
            self._failed = False  # somebody else has taken the node out of its active state meanwhile

    def _serialise(self, trajectories: list[Trajectory]) -> list[tuple[str, Any]]:
        """The topic and the message of each trajectory of one moment.

        They carry the time for which they were made: whatever the message takes, the controllers are in time where
        they join what they follow already, since its first points lie on that.
        """
        dry_run = self.get_parameter("dry_run").value
        return [
            (
                one.topic,
                serialized_joint_trajectory(
                    one, Time(nanoseconds=one.start_ns).to_msg(), one.controller if dry_run else ""
                ),
            )
            for one in trajectories
        ]

    def _send(self, messages: list[tuple[str, Any]]) -> None:
        """Publishes the messages of one moment."""
        if not self.context.ok():
            return  # a signal has ended ROS while this chunk was being made
        for topic, message in messages:
            self._sending[topic].publish(message)

    def _notify(self, level: int, text: str) -> None:
        # One call a severity: rclpy refuses a call whose severity changes.
        if level >= logging.WARNING:
            self.get_logger().warning(text)
        else:
            self.get_logger().info(text)

    def _stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        runner = self.runner
        if runner is None:
            response.message = f"nothing to stop: the node is {self.state}"
            return response
        try:
            runner.stop()
        except Exception as error:  # noqa: BLE001 - whoever called gets an answer
            self.get_logger().error(f"the stop was not sent\n{traceback.format_exc()}")
            response.message = f"nothing is sent any more, but the stop itself was not sent: {error}"
            return response
        self.get_logger().warning(
            "stopped by ~/stop: nothing is sent until the node is deactivated and activated again"
        )
        response.success = True
        response.message = "stopped; deactivate and activate the node to go on"
        return response

    def _set_task(self, message: String) -> None:
        runner = self.runner
        if runner is None:
            return  # being cleaned up
        try:
            task = load_task(message.data, self._embodiment)
        except Exception as error:  # noqa: BLE001 - whatever somebody publishes, the node goes on
            self.get_logger().warning(f"task refused, the old one stays: {error}", throttle_duration_sec=1.0)
            return
        runner.instruction = task.instruction
        self.get_logger().info(f"task: {task.instruction}")

    def _check_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        known = (*settings.PARAMETERS, *settings.OLD_PARAMETERS)
        names = [parameter.name for parameter in parameters if parameter.name in known]
        if names and self.state != "unconfigured":
            return SetParametersResult(
                successful=False, reason=f"{names[0]} is read when the node is configured: clean it up first"
            )
        return SetParametersResult(successful=True)

    # ------------------------------------------------------------------------------------------------ diagnostics

    def _report(self) -> Report:
        runner, inputs, state = self.runner, self._inputs, self.state
        if runner is None or inputs is None:
            if self._fault is not None:
                return Report(Level.ERROR, f"{state}: {self._fault}")
            return Report(Level.OK, "loading the policy" if state == "configuring" else state)
        its = {
            "state": state,
            "instruction": runner.instruction,
            "speed scaling": "not published" if runner.speed_scaling is None else runner.speed_scaling,
            "dry run": self.get_parameter("dry_run").value,
        }
        values = its | report_values(runner, inputs, self._now_ns())
        if runner.stopped:
            return Report(Level.WARN, "stopped by ~/stop", values)
        if state == "inactive" and self._fault is not None:
            return Report(Level.ERROR, f"not activated: {self._fault}", values)
        if state == "active" and runner.fault_reason is not None:
            return Report(Level.WARN, f"safe stop: {runner.fault_reason}", values)
        return Report(Level.OK, state, values)


def main() -> int:
    """Entry point of ``ros2 run clp_ros policy``."""
    return run_node(PolicyNode, threads=1, last_words=PolicyNode.brake)


if __name__ == "__main__":
    raise SystemExit(main())
