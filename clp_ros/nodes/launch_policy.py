# SPDX-License-Identifier: Apache-2.0
"""Launch descriptions for robots and tasks: they start the policy node, configure it and activate it."""

from launch import Action, LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterFile
from lifecycle_msgs.msg import Transition

from clp_ros.core.resources import resource_path
from clp_ros.nodes.launch_node import NodeArguments, node_description
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.task import read_task


def policy_description() -> LaunchDescription:
    """Returns the launch description for any robot and task."""
    return _description([], "checkpoint", "embodiment", "task")


def embodiment_description(embodiment: str) -> LaunchDescription:
    """Returns the launch description for one robot, with an argument for each of its topics.

    Args:
        embodiment: The robot's name under config/embodiments.
    """
    return _description(_topic_arguments(embodiment), "checkpoint", "task", embodiment=embodiment)


def task_description(task: str) -> LaunchDescription:
    """Returns the launch description for one task on its robot.

    Args:
        task: The task's name under config/tasks. If the task has several objects, the object is an argument.
    """
    description = read_task(task)
    first = _topic_arguments(description.embodiment)
    if description.choices:
        first += [
            DeclareLaunchArgument(
                "object", choices=list(description.choices), description="What the task is done with"
            ),
            OpaqueFunction(function=_choose_object, args=[task]),
        ]
    return _description(first, "checkpoint", task=task, embodiment=description.embodiment)


def _description(first: list[Action], /, *required: str, **optional: str) -> LaunchDescription:
    return LaunchDescription(
        [
            *first,
            DeclareLaunchArgument(
                "autostart",
                default_value="true",
                description="Configure and activate the node; false leaves that to ros2 lifecycle set /policy",
            ),
            DeclareLaunchArgument(
                "sim",
                default_value="false",
                choices=["true", "false"],
                description="Start a simulated robot behind the same topics (config/nodes/simulation.yaml)",
            ),
            DeclareLaunchArgument(
                "raw_images",
                default_value="false",
                description="Use the Fast DDS profile config/dds/fastdds.xml, without which raw images get lost; "
                "the camera drivers need it too",
            ),
            SetEnvironmentVariable(
                "FASTRTPS_DEFAULT_PROFILES_FILE",
                str(resource_path("config/dds/fastdds.xml")),
                condition=IfCondition(LaunchConfiguration("raw_images")),
            ),
            node_description(
                "policy",
                _start,
                *required,
                **optional,
                tf_prefix="",
                topics="",
                robot_description_wait="",
                heads="",
                device="",
                dry_run="",
                use_sim_time="",
            ),
        ]
    )


def _topic_arguments(name: str) -> list[Action]:
    """Returns an argument for each topic of an embodiment, and the action that sets the node's parameter from them."""
    embodiment = load_embodiment(name)
    arguments: dict[str, tuple[str, str]] = {}
    for camera, its in embodiment.cameras.items():
        arguments[f"{camera}_topic"] = f"cameras.{camera}", f"Topic of the camera {camera} instead of {its.topic}"
    for states, its in embodiment.joint_states.items():
        entry = f"joint_states.{states}"
        arguments[f"{states}_joint_states_topic"] = entry, f"Topic of the joint states instead of {its.topic}"
        arguments[f"{states}_robot_description_topic"] = (
            f"{entry}.robot_description",
            f"Topic of the robot description instead of {its.description_topic}, "
            "which is beside the joint states wherever they are",
        )
    for controller, its in embodiment.controllers.items():
        arguments[f"{controller}_controller_topic"] = (
            f"controllers.{controller}",
            f"Topic of the {controller}'s trajectories instead of {its.topic}",
        )
    if (speed := embodiment.speed_scaling) is not None:
        arguments["speed_scaling_topic"] = "speed_scaling", f"Topic of the speed scaling instead of {speed.topic}"

    def collect(context: LaunchContext) -> None:
        given = context.launch_configurations
        topics = [f"{entry}:={given[argument]}" for argument, (entry, _) in arguments.items() if given[argument]]
        if topics:
            given["topics"] = ",".join([*filter(None, [given.get("topics")]), *topics])

    return [
        *(
            DeclareLaunchArgument(argument, default_value="", description=description)
            for argument, (_, description) in arguments.items()
        ),
        OpaqueFunction(function=collect),
    ]


def _choose_object(context: LaunchContext, task: str) -> None:
    context.launch_configurations.setdefault("task", f"{task}:{context.launch_configurations['object']}")


def _simulation(arguments: NodeArguments) -> Action:
    """Returns the action that starts the simulated robot if ``sim`` is true. When it ends, the launch ends."""
    _, given = arguments["parameters"]
    same = {name: given[name] for name in ("embodiment", "tf_prefix", "topics") if name in given}
    if "use_sim_time" in given:
        same["clock"] = given["use_sim_time"]  # with use_sim_time, the simulator must publish /clock
    settings = ParameterFile(str(resource_path("config/nodes/simulation.yaml")), allow_substs=False)
    return Node(
        package="clp_ros",
        executable="simulation",
        name="simulation",
        parameters=[settings, same],
        output="screen",
        emulate_tty=True,
        # Not while the launch is already ending, as after Ctrl-C.
        on_exit=lambda _, context: None if context.is_shutdown else Shutdown(reason="the simulated robot has ended"),
        condition=IfCondition(LaunchConfiguration("sim")),
    )


def _start(arguments: NodeArguments) -> list[Action]:
    policy = LifecycleNode(**arguments)
    autostart = IfCondition(LaunchConfiguration("autostart"))

    def change(transition: int, **kwargs: IfCondition) -> EmitEvent:
        event = ChangeState(lifecycle_node_matcher=matches_action(policy), transition_id=transition)
        return EmitEvent(event=event, **kwargs)

    # Only once, and only from configuring: a node that a user deactivates must stay inactive.
    configured = OnStateTransition(
        target_lifecycle_node=policy,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(Transition.TRANSITION_ACTIVATE)],
        handle_once=True,
    )
    return [
        _simulation(arguments),
        RegisterEventHandler(configured, condition=autostart),
        policy,
        change(Transition.TRANSITION_CONFIGURE, condition=autostart),
    ]
