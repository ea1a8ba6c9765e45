# SPDX-License-Identifier: Apache-2.0
"""The simulation node: a MuJoCo robot behind the topics of the real one.

The node publishes camera images and joint states. It follows each controller's trajectories by the rules of a
joint_trajectory_controller. One thread does all of this, and skips images on a slow computer. A second thread serves
the controllers' parameters.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from rclpy.clock import Clock as RclpyClock
from rclpy.clock import ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, JointState
from std_msgs.msg import Bool, Header, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.messages.images import JPEG_FORMAT, encode_jpeg
from clp_ros.messages.stamps import header_stamp_ns
from clp_ros.nodes.messages import INPUT_TYPES, NANOSECONDS, image_message, time_message
from clp_ros.nodes.parameters import declare, given_embodiment
from clp_ros.nodes.simulated_controllers import SimulatedControllerNodes
from clp_ros.nodes.spin import main as run_node
from clp_ros.nodes.topics import LATCHED
from clp_ros.robots.embodiment import Camera
from clp_ros.robots.trajectory_controller import Command, Point, RejectedError
from clp_ros.simulation.description import robot_description
from clp_ros.simulation.robot import SimulatedRobot
from clp_ros.simulation.task_registry import simulated_task
from clp_ros.simulation.task_simulation import TaskSimulation

PARAMETERS: dict[str, tuple[Any, str]] = {
    "embodiment": ("", "The robot: a name under config/embodiments, or a YAML file of one of those names"),
    "tf_prefix": ("", "Prefix of every joint name, as the driver's argument of that name"),
    "topics": ([""], "Topics that differ from the embodiment's, each ENTRY:=TOPIC"),
    "task": ("", "A simulated task: its scene, instruction and success test; empty: a cube on the table"),
    "seed": (0, "Seed of the start; ~/reset adds 1 to it"),
    "rate": (1.0, "Speed, 1 for real time; any other needs clock"),
    "clock": (False, "Whether time begins at 1 s and is published on /clock, for nodes with use_sim_time"),
    "camera_rate": (20.0, "Images per second, of each camera"),
    "joint_state_rate": (100.0, "Joint states per second"),
    "pictures": ("render", "render: rendered images; plain: images of one colour, for machines that cannot render"),
}
PICTURES = ("render", "plain")
_TICK_S = 0.004
_LATE_NS = 20_000_000
_GREY = 128


class SimulationNode(Node):
    """Simulates a robot. See the module's text; config/nodes/simulation.yaml explains the parameters.

    Attributes:
        robot: The simulated robot.

    Raises:
        ClpError: A parameter is invalid, the robot has no simulation, a package is missing, or rendering fails.
    """

    def __init__(self) -> None:
        super().__init__("simulation")
        declare(self, PARAMETERS, read_only=True)
        self._embodiment = given_embodiment(self)
        self._rate = self._positive("rate")
        clock = self.get_parameter("clock").value
        if self._rate != 1 and not clock:
            raise ClpError(
                f"the parameter rate is {self._rate:g}", where="simulation", hint="set clock to true as well"
            )
        self._plain = self._choice("pictures", PICTURES) == "plain"
        self._seed = self.get_parameter("seed").value
        if self._seed < 0:
            raise ClpError(f"the parameter seed is {self._seed}", where="simulation", hint="give a seed of at least 0")
        self.robot = self._simulated_robot(self.get_parameter("task").value)
        for name, camera in self._embodiment.cameras.items():
            self._picture(name, camera)  # raises now if rendering fails, and creates the renderer
        self._clock_publisher = self.create_publisher(Clock, "/clock", qos_profile_sensor_data) if clock else None
        self._began_s = time.monotonic()
        self._began_ns = NANOSECONDS if clock else self.get_clock().now().nanoseconds
        self._sources = self._advertise()
        self._describe()
        parameters = self.robot.controller_parameters
        self._controllers = SimulatedControllerNodes(self._embodiment, parameters, self.context)
        for name, controller in self._embodiment.controllers.items():
            self.create_subscription(
                JointTrajectory, controller.topic, partial(self._receive, name), QoSProfile(depth=1)
            )
        self.create_service(Trigger, "~/reset", self._reset)
        self._instructions = self.create_publisher(String, "~/instruction", LATCHED)
        self._successes = self.create_publisher(Bool, "~/success", LATCHED)
        self._succeeded: bool | None = None
        self._announce()
        self.create_timer(_TICK_S, self._tick, clock=RclpyClock(clock_type=ClockType.STEADY_TIME))
        self.get_logger().info(f"simulating {self._embodiment.name}, {'plain' if self._plain else 'drawn'} pictures")

    def destroy_node(self) -> None:
        """Frees the renderers and the controllers' nodes, and destroys the node."""
        self.robot.close()
        self._controllers.close()
        super().destroy_node()

    def _simulated_robot(self, task: str) -> SimulatedRobot:
        if not task:
            return SimulatedRobot(self._embodiment, self._seed)
        return TaskSimulation(self._embodiment, simulated_task(task, self._embodiment), self._seed)

    def _announce(self) -> None:
        """Publishes the instruction of a new start."""
        if isinstance(self.robot, TaskSimulation):
            self._succeeded = None
            self._instructions.publish(String(data=self.robot.instruction()))
            self._judge()

    def _judge(self) -> None:
        """Publishes whether the task's success test has held long enough, when that changes."""
        if isinstance(self.robot, TaskSimulation):
            success = self.robot.success_s is not None
            if success != self._succeeded:
                self._succeeded = success
                self._successes.publish(Bool(data=success))

    def _advertise(self) -> list[_Event]:
        events = []
        period = round(NANOSECONDS / self._positive("joint_state_rate"))
        for name, states in self._embodiment.joint_states.items():
            publisher = self.create_publisher(JointState, states.topic, QoSProfile(depth=10))
            events.append(_Event(self._began_ns, period, partial(self._publish_joints, publisher, name)))
        period = round(NANOSECONDS / self._positive("camera_rate"))
        for index, (name, camera) in enumerate(self._embodiment.cameras.items()):
            publisher = self.create_publisher(INPUT_TYPES[camera.type], camera.topic, qos_profile_sensor_data)
            # The cameras are not synchronised, as real ones.
            first = self._began_ns + index * period // len(self._embodiment.cameras)
            publish = partial(self._publish_picture, publisher, name, camera)
            events.append(_Event(first, period, publish, is_picture=True))
        return events

    def _describe(self) -> None:
        sources: dict[str, list[str]] = {}
        for name, states in self._embodiment.joint_states.items():
            sources.setdefault(states.description_topic, []).append(name)
        for topic, names in sources.items():
            publisher = self.create_publisher(String, topic, LATCHED)
            publisher.publish(String(data=robot_description(self.robot, names)))

    def _now_ns(self) -> int:
        return self._began_ns + round((time.monotonic() - self._began_s) * self._rate * NANOSECONDS)

    def _tick(self) -> None:
        now = self._now_ns()
        while (event := min(self._sources, key=lambda one: one.due_ns)).due_ns <= now:
            if event.is_picture and (time_ns := self._now_ns()) - event.due_ns > _LATE_NS:
                event.due_ns = time_ns  # like a slow camera: a later image with a later stamp
                continue
            self.robot.step(event.due_ns)
            if self._clock_publisher is not None:
                self._clock_publisher.publish(Clock(clock=time_message(event.due_ns)))
            event.publish(event.due_ns)
            # On a slow computer, events that are too late are skipped.
            event.due_ns += event.period_ns * max(1, (self._now_ns() - event.due_ns) // event.period_ns)
        self.robot.step(now)
        if self._clock_publisher is not None:
            self._clock_publisher.publish(Clock(clock=time_message(now)))
        self._judge()

    def _receive(self, controller: str, message: JointTrajectory) -> None:
        points = tuple(
            Point(
                point.time_from_start.sec * NANOSECONDS + point.time_from_start.nanosec,
                np.array(point.positions),
                point.velocities,
                point.accelerations,
                point.effort,
            )
            for point in message.points
        )
        command = Command(tuple(message.joint_names), points, header_stamp_ns(message))
        try:
            self.robot.command(controller, command, self._now_ns())
        except RejectedError as rejected:
            self.get_logger().warning(f"{controller} drops a trajectory: {rejected}", throttle_duration_sec=1.0)

    def _publish_joints(self, publisher: Any, source: str, time_ns: int) -> None:
        names, positions, speeds = self.robot.joint_states(source)
        header = Header(stamp=time_message(time_ns))
        publisher.publish(
            JointState(header=header, name=names, position=array("d", positions), velocity=array("d", speeds))
        )

    def _publish_picture(self, publisher: Any, name: str, camera: Camera, time_ns: int) -> None:
        if not publisher.get_subscription_count():
            return
        picture, frame = self._picture(name, camera), f"{name}_color_optical_frame"
        if camera.type.endswith("CompressedImage"):
            message = CompressedImage(header=Header(stamp=time_message(time_ns), frame_id=frame), format=JPEG_FORMAT)
            message.data = array("B", encode_jpeg(picture).tobytes())
        else:
            message = image_message(picture, time_message(time_ns), frame)
        publisher.publish(message)

    def _picture(self, name: str, camera: Camera) -> np.ndarray:
        if self._plain:
            return np.full((camera.height, camera.width, 3), _GREY, dtype=np.uint8)
        try:
            return self.robot.picture(name, camera.height, camera.width)
        except ClpError as error:
            hint = f"{error.hint}, or the parameter pictures to plain"
            raise ClpError(error.what, where=error.where, hint=hint) from error

    def _reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._seed += 1
        self.robot.reset(self._seed)
        self._announce()
        response.success, response.message = True, f"seed {self._seed}"
        return response

    def _positive(self, name: str) -> float:
        value = self.get_parameter(name).value
        if not 0 < value < float("inf"):
            raise ClpError(f"the parameter {name} is {value}", where="simulation", hint="give a number above 0")
        return value

    def _choice(self, name: str, choices: Sequence[str]) -> str:
        value = self.get_parameter(name).value
        if value not in choices:
            raise ClpError(
                f"the parameter {name} is {value!r}", where="simulation", hint=did_you_mean(value, list(choices))
            )
        return value


class _Event:
    """A periodic publication."""

    def __init__(self, due_ns: int, period_ns: int, publish: Any, is_picture: bool = False) -> None:
        self.due_ns, self.period_ns, self.publish, self.is_picture = due_ns, period_ns, publish, is_picture


def main(args: Sequence[str] | None = None) -> int:
    """Runs the node until a signal."""
    return run_node(SimulationNode, args, threads=1)


if __name__ == "__main__":
    raise SystemExit(main())
