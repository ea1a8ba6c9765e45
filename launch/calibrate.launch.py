# SPDX-License-Identifier: Apache-2.0
"""Starts the calibration node, which finds redundant layers from recorded bags or from the robot's live topics."""

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from launch import Action, Event, EventHandler, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, RegisterEventHandler
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.ros_adapters import get_ros_node
from std_msgs.msg import String

from clp_ros.nodes.launch_node import NodeArguments, node_description
from clp_ros.nodes.topics import LATCHED


class Failed(Event):
    """The node reported a fault."""

    name = "clp_ros.calibration.Failed"

    def __init__(self, fault: str) -> None:
        self.fault = fault


def start(arguments: NodeArguments) -> list[Action]:
    calibration = Node(**arguments)
    asked = IfCondition(LaunchConfiguration("exit_when_done"))
    failed = EventHandler(matcher=lambda event: isinstance(event, Failed), entities=OpaqueFunction(function=fail))
    died = OnProcessExit(target_action=calibration, on_exit=fail_if_it_died)
    return [
        RegisterEventHandler(failed, condition=asked),
        RegisterEventHandler(died, condition=asked),
        calibration,
        OpaqueFunction(function=end_when_done, args=[calibration], condition=asked),
    ]


def fail(context: LaunchContext) -> None:
    # An exception of an event handler is the only way to an exit code: launch shuts down and returns 1.
    if not context.is_shutdown:  # the node repeats its fault every second
        raise RuntimeError(context.locals.event.fault)


def fail_if_it_died(event: ProcessExited, context: LaunchContext) -> None:
    if event.returncode and not context.is_shutdown:
        raise RuntimeError(f"the calibration node ended with {event.returncode}")


def end_when_done(context: LaunchContext, calibration: Node) -> None:
    """Ends the launch when the node has written its folder (exit code 0) or reported a fault (1)."""
    name = calibration.node_name

    def emit(event: Event) -> None:
        # This runs in the thread of the ROS node.
        context.asyncio_loop.call_soon_threadsafe(context.emit_event_sync, event)

    def receive(diagnostics: DiagnosticArray) -> None:
        for status in diagnostics.status:
            if f"/{status.name}" == name and status.level == DiagnosticStatus.ERROR:
                emit(Failed(status.message))

    def done(folder: String) -> None:
        emit(Shutdown(reason=f"calibrated: {folder.data}"))

    node = get_ros_node(context)
    node.create_subscription(String, f"{name}/done", done, LATCHED)
    node.create_subscription(DiagnosticArray, "/diagnostics", receive, 10)


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                "exit_when_done",
                default_value="false",
                description="End the launch when the calibration is done (exit code 0) or has failed (1); "
                "otherwise the node stays for those who ask for its topics later",
            ),
            node_description(
                "calibration",
                start,
                "checkpoint",
                "embodiment",
                "task",
                tf_prefix="",
                topics="",
                bag="",
                samples="",
                output="",
                overwrite="",
                seed="",
                device="",
                statistics="",
                use_sim_time="",
            ),
        ]
    )
