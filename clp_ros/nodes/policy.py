# SPDX-License-Identifier: Apache-2.0
"""The policy node: a robot's camera and joint topics in, one JointTrajectory per controller and chunk out.

This is a managed node. Configuring loads the checkpoint and subscribes to the inputs. Activating waits until every
input is received. Only an active node sends. Deactivating, ~/stop and every fault (:mod:`clp_ros.control.watchdog`)
bring the robot to rest.

Five kinds of threads are involved. The listener's thread receives images and joint states, and decodes none. The
executor's thread runs services, timers and the other topics, and never waits for the policy. A thread of its own runs
each transition. The runner's worker calls the policy and publishes; the runner's watchdog publishes safe stops. The
executor has one thread: rclpy's multi-threaded one holds the interpreter longer, which delays decoding and publishing.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from std_msgs.msg import Float64, String
from std_srvs.srv import Trigger

from clp_ros.control.fault_handler import LOG_AGAIN_S
from clp_ros.control.inputs import LiveInputs
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.run_log import RunLog
from clp_ros.control.runner import ChunkRunner
from clp_ros.core.errors import ClpError
from clp_ros.core.threads import set_threads
from clp_ros.nodes import policy_loading
from clp_ros.nodes import policy_settings as settings
from clp_ros.nodes.controllers import ControllerNodes
from clp_ros.nodes.diagnostics import Diagnostics, Report
from clp_ros.nodes.input_wait import WaitEndedError, wait_for_inputs
from clp_ros.nodes.lifecycle import REFUSALS, BusyError, ManagedNode
from clp_ros.nodes.listener import Listener
from clp_ros.nodes.messages import INPUT_TYPES
from clp_ros.nodes.parameters import check_known, checkpoint_folder, declare, declare_old, given_embodiment, given_text
from clp_ros.nodes.policy_report import node_report
from clp_ros.nodes.robot_description import RobotDescriptions
from clp_ros.nodes.spin import main as run_node
from clp_ros.nodes.topics import sensor_input
from clp_ros.nodes.trajectory_publishers import TrajectoryPublishers
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.task import load_task

# How long to wait for the policy to finish its chunk when the node is cleaned up or ends, in seconds.
_CLOSE_S = 30.0
_NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class PolicyNode(ManagedNode):
    """Drives a robot with a policy. See the module's text; config/nodes/policy.yaml explains the parameters.

    Args:
        load: Loads the policy.

    Attributes:
        runner: Makes and sends chunks; None while the node is not configured.
    """

    def __init__(self, load: policy_loading.LoadPolicy = policy_loading.load_policy) -> None:
        super().__init__("policy")
        declare(self, settings.PARAMETERS, read_only=False)
        declare_old(self, settings.OLD_PARAMETERS)
        self.add_on_set_parameters_callback(self._check_parameters)
        self._load = load
        self._embodiment: Embodiment | None = None
        self._inputs: LiveInputs | None = None
        self.runner: ChunkRunner | None = None
        self._controllers: ControllerNodes | None = None
        self._listener: Listener | None = None
        self._tasks: Subscription | None = None
        self._trajectories: TrajectoryPublishers | None = None
        self._check_task: Callable[[str], None] = lambda instruction: None
        self._fault: str | None = None
        self._failed = False
        self.create_service(Trigger, "~/stop", self._stop)
        self._diagnostics = Diagnostics(self, self._report)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Reads the parameters, loads the policy, checks that it fits the robot, and subscribes to the inputs."""
        self._fault = None
        try:
            self._set_up()
        except policy_loading.EndedError:
            return TransitionCallbackReturn.FAILURE
        except ClpError as error:
            self.release()
            self._fault = str(error)
            self.get_logger().error(f"not configured: {error}")
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Waits until every input is received, and starts sending. An earlier stop is cleared."""
        self._fault = None
        self.runner.clear_stop()
        if not self._wait_for_inputs():
            return TransitionCallbackReturn.FAILURE
        try:
            controllers = self._controllers.check(self._is_ended)
        except ClpError as error:
            self._fault = str(error)
            self.get_logger().error(f"not activated: {error}")
            return TransitionCallbackReturn.FAILURE
        result = super().on_activate(state)
        speed = self._embodiment.speed_scaling
        if speed is not None and self.runner.speed_scaling is None:
            self.get_logger().info(f"{speed.topic} is not published: full speed is assumed")
        from_measured = [name for name, facts in controllers.items() if facts.from_desired is False]
        if not self.runner.activate(from_measured):  # stopped meanwhile
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        return result

    def _wait_for_inputs(self) -> bool:
        """Waits until every input is received. Returns whether it is; if not, the reason is logged."""
        try:
            self._fault = wait_for_inputs(
                self,
                self._embodiment,
                self._inputs,
                partial(self._receive, self._inputs),
                self.get_parameter("activate_timeout").value,
                self._is_ended,
            )
        except WaitEndedError:
            return False
        if self._fault is not None:
            self.get_logger().error(f"not activated: {self._fault}")
        return self._fault is None

    def _is_ended(self) -> bool:
        return self.runner.stopped or not self.context.ok()

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brings the robot to rest. Nothing is sent after this returns."""
        self.runner.deactivate()
        result = super().on_deactivate(state)
        return TransitionCallbackReturn.ERROR if self._failed else result

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Frees the policy and everything else that configuring created."""
        result = super().on_cleanup(state)
        self.release()
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Brings the robot to rest and cleans up, from any state."""
        self.brake()
        result = super().on_shutdown(state)
        self.release()
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Cleans up. The node is unconfigured then, and can be configured again."""
        result = super().on_error(state)
        self._failed = False
        self.release()
        return result

    def failed(self, error: BaseException) -> None:
        """Records an unexpected exception of a transition for /diagnostics."""
        self._fault = f"{type(error).__name__}: {error}"

    def brake(self) -> None:
        """Brings the robot to rest, and waits until the controllers have received the message."""
        runner, publishers = self.runner, self._trajectories  # read once: a transition may set both to None
        if runner is not None:
            runner.deactivate()
            if publishers is not None:
                publishers.wait_until_acknowledged()

    def _set_up(self) -> None:
        check_known(self, list(settings.PARAMETERS))
        checkpoint = checkpoint_folder(self)
        embodiment = given_embodiment(self)
        task = load_task(given_text(self, "task", "a name under config/tasks, or an instruction"), embodiment)
        self.get_logger().info(f"loading {checkpoint}")
        if (threads := set_threads(self.get_parameter("threads").value)) is not None:  # before torch computes anything
            self.get_logger().info(f"torch computes with {threads} threads")
        import cv2  # noqa: F401 - takes a second, and the first image needs it

        heads = settings.given_heads(self, embodiment)
        self._controllers = ControllerNodes(self, embodiment)  # the controllers are discovered while the policy loads
        with RobotDescriptions(self, embodiment) as descriptions:  # received while the policy loads
            given = {"heads": heads, "task": task.instruction} if heads else {}
            policy = self._load(checkpoint, self.get_parameter("device").value, **given)
            embodiment = descriptions.narrow()
        if not self.context.ok():
            raise policy_loading.EndedError
        features = [camera.feature for camera in embodiment.cameras.values()]
        for note in policy.check_features(features, embodiment.action_size, embodiment.name) or ():
            self.get_logger().warning(note)
        replan = settings.replan_config(self, task, policy.chunk_size)
        schedule, watchdog = settings.schedule(self), settings.watchdog_config(self)
        if self.get_parameter("compile").value:
            self.get_logger().info("compiling the denoising step")
            policy_loading.compile_for_node(policy, schedule.mode, task.instruction)
        if schedule.mode == "rtc":
            policy.enable_rtc(replan.replan_steps or task.execution_length)
        self._check_task = getattr(policy, "check_task", lambda instruction: None)
        policy_loading.freeze_memory()
        self._embodiment, self._inputs = embodiment, LiveInputs(embodiment)
        publishers = TrajectoryPublishers(self, embodiment, self.get_parameter("dry_run").value)
        self._trajectories = publishers
        self.runner = ChunkRunner(
            embodiment,
            self._inputs,
            policy,
            task.instruction,
            replan,
            publishers.send,
            clock_ns=self._now_ns,
            notify=self._notify,
            schedule=schedule,
            watchdog=watchdog,
            failed=self._fail,
            log=RunLog(self.get_parameter("log_folder").value or None),
            processor=self._processor_share(policy),
            serialise=publishers.serialise,
        )
        self._listen(embodiment)
        self.get_logger().info(f"{embodiment.name}: {task.instruction}")

    def _processor_share(self, policy: Any) -> ProcessorShare | None:
        """Returns the check for a policy on the CPU; None on a GPU, where the thread waits for the GPU."""
        on_cpu = getattr(policy, "device", None) == "cpu"
        return ProcessorShare(partial(self._notify, logging.WARNING)) if on_cpu else None

    def _listen(self, embodiment: Embodiment) -> None:
        topics = {topic: INPUT_TYPES[kind] for topic, kind in embodiment.topics.items()}
        qos = {topic: sensor_input(kind) for topic, kind in embodiment.topics.items()}
        if embodiment.speed_scaling is not None:
            topics[embodiment.speed_scaling.topic] = Float64
            qos[embodiment.speed_scaling.topic] = _NEWEST
        self._listener = Listener(self, topics, qos, partial(self._receive, self._inputs))
        self._tasks = self.create_subscription(String, "~/task", self._set_task, QoSProfile(depth=1))

    def release(self) -> None:
        """Stops sending, ends the runner, and frees the policy. A step that fails does not prevent the others."""
        listener, self._listener = self._listener, None
        tasks, self._tasks = self._tasks, None
        controllers, self._controllers = self._controllers, None
        runner, self.runner = self.runner, None
        publishers, self._trajectories = self._trajectories, None
        with ExitStack() as last_first:
            last_first.callback(self._free)
            if controllers is not None:
                last_first.callback(controllers.close)
            if publishers is not None:
                last_first.callback(publishers.close)
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
        self._check_task = lambda instruction: None  # which refers to the policy
        policy_loading.free_memory()

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
            self.get_logger().warning(str(error), throttle_duration_sec=LOG_AGAIN_S)

    def _fail(self, why: str) -> None:
        """Goes to the error state of the lifecycle, after too many faults."""
        self.get_logger().error(f"giving up: {why}")
        self._fault, self._failed = f"gave up: {why}", True
        try:
            self.exclusively(self.trigger_deactivate)
        except (BusyError, *REFUSALS):
            self._failed = False  # another transition has ended the active state meanwhile

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
        except Exception as error:  # noqa: BLE001 - the caller needs an answer
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
            self._check_task(task.instruction)
        except Exception as error:  # noqa: BLE001 - no published task may end the node
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

    def _report(self) -> Report:
        dry_run = self.get_parameter("dry_run").value
        return node_report(self.state, self._fault, self.runner, self._inputs, self._now_ns(), dry_run)


def main() -> int:
    """Entry point of ``ros2 run clp_ros policy``."""
    return run_node(PolicyNode, threads=1, last_words=PolicyNode.brake)


if __name__ == "__main__":
    raise SystemExit(main())
