# SPDX-License-Identifier: Apache-2.0
"""Shared by the launch files of nodes that run one job: the launch can end with the job."""

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

    name = "clp_ros.job.Failed"

    def __init__(self, fault: str) -> None:
        self.fault = fault


def job_description(executable: str, *required: str, **optional: str) -> LaunchDescription:
    """Returns the launch description of a node that runs one job (:class:`clp_ros.nodes.job_node.JobNode`).

    Args:
        executable: As for :func:`clp_ros.nodes.launch_node.node_description`.
        *required: The same.
        **optional: The same.
    """
    end = DeclareLaunchArgument(
        "exit_when_done",
        default_value="false",
        description="End the launch when the job is done (exit code 0) or has failed (1); otherwise the node keeps "
        "running, so that its latched topics can be received",
    )
    return LaunchDescription([end, node_description(executable, _start, *required, **optional)])


def _start(arguments: NodeArguments) -> list[Action]:
    node = Node(**arguments)
    asked = IfCondition(LaunchConfiguration("exit_when_done"))
    failed = EventHandler(matcher=lambda event: isinstance(event, Failed), entities=OpaqueFunction(function=_fail))
    died = OnProcessExit(target_action=node, on_exit=_fail_if_it_died)
    return [
        RegisterEventHandler(failed, condition=asked),
        RegisterEventHandler(died, condition=asked),
        node,
        OpaqueFunction(function=_end_when_done, args=[node], condition=asked),
    ]


def _fail(context: LaunchContext) -> None:
    # An exception of an event handler is the only way to an exit code: launch shuts down and returns 1.
    if not context.is_shutdown:  # the node repeats its fault every second
        raise RuntimeError(context.locals.event.fault)


def _fail_if_it_died(event: ProcessExited, context: LaunchContext) -> None:
    if event.returncode and not context.is_shutdown:
        raise RuntimeError(f"the node ended with {event.returncode}")


def _end_when_done(context: LaunchContext, job: Node) -> None:
    """Ends the launch when the node has published its folder (exit code 0) or reported a fault (1)."""
    name = job.node_name

    def emit(event: Event) -> None:
        # This runs in the thread of the ROS node.
        context.asyncio_loop.call_soon_threadsafe(context.emit_event_sync, event)

    def receive(diagnostics: DiagnosticArray) -> None:
        for status in diagnostics.status:
            if f"/{status.name}" == name and status.level == DiagnosticStatus.ERROR:
                emit(Failed(status.message))

    def done(folder: String) -> None:
        emit(Shutdown(reason=f"done: {folder.data}"))

    node = get_ros_node(context)
    node.create_subscription(String, f"{name}/done", done, LATCHED)
    node.create_subscription(DiagnosticArray, "/diagnostics", receive, 10)
