# SPDX-License-Identifier: Apache-2.0
"""Shared by the launch files: arguments, and a node's parameters from a file, overridden by given arguments."""

import json
from collections.abc import Callable
from typing import Any

from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, TextSubstitution
from launch_ros.parameter_descriptions import ParameterFile, ParameterValue

from clp_ros.core.resources import resource_path

# Arguments that are also parameters of the node: the parameter's type, and the description for --show-args.
PARAMETERS: dict[str, tuple[type, str]] = {
    "checkpoint": (
        str,
        "Folder of the policy's checkpoint, or a repository on the hub as owner/name or owner/name@revision",
    ),
    "embodiment": (str, "The robot: a name under config/embodiments, or a YAML file of your own"),
    "tf_prefix": (str, "Prefix of every joint name, as the robot driver's argument of that name"),
    "topics": (
        list[str],
        "Topics that differ from the embodiment's, by its entry, as cameras.cam_high:=/top/image/compressed; "
        "several as A,B",
    ),
    "robot_description_wait": (
        float,
        "Seconds to wait for the robot's description (URDF), whose limits narrow the embodiment's; 0: it is not used",
    ),
    "task": (
        str,
        "The instruction: a name under config/tasks (NAME:OBJECT where it has several objects), or the sentence itself",
    ),
    "bag": (
        list[str],
        "Recorded rosbag2 folder to read, or several as A,B; without one, the embodiment's live topics are used",
    ),
    "bags": (list[str], "Recorded rosbag2 folders, one episode each, as A,B"),
    "episodes_by": (str, "How bags are cut into episodes: bag, topic:NAME, silence:SECONDS or times:FILE.csv"),
    "action": (str, "Where actions come from: next_state or topics; without it, as the embodiment says"),
    "fps": (int, "Frames per second of the dataset; without it, the control rate"),
    "images": (str, "How pictures are stored: video or png"),
    "resize": (str, "Size of the pictures, as 320x240; without it, as recorded"),
    "stamps": (bool, "Whether the original stamps are stored too"),
    "batch_size": (int, "Frames of a training step"),
    "train": (str, "Weights to train: default (as lerobot), all, expert, last=K or lora=R"),
    "samples": (int, "How many frames the calibration draws"),
    "output": (str, "Folder to write; it must be new or empty, unless overwrite is true"),
    "overwrite": (bool, "Whether an output folder that is not empty is replaced"),
    "seed": (int, "Seed of all random draws"),
    "device": (str, "Where the policy runs: auto, cpu, cuda or cuda:<index>"),
    "statistics": (
        str,
        "Statistics for a checkpoint that has none: a LeRobotDataset's folder, or bags for those of the bags",
    ),
    "use_sim_time": (bool, "Whether the clock is the topic /clock, as of `ros2 bag play --clock` or a simulator"),
    "dry_run": (bool, "Whether the policy's trajectories are published on its topic preview only, so no robot moves"),
    "calibration": (str, "Calibration folder; without one, the folder received on the calibration node's topic done"),
    "budgets": (list[str], "Layers to remove from each module, as MODULE=K,MODULE=K; without any, the paper's share"),
    "threshold": (
        float,
        "Lowest similarity at which a layer may be removed; without one, the largest that leaves enough",
    ),
    "dataset": (str, "LeRobotDataset to train on (version 3)"),
    "resume": (bool, "Whether an unfinished run with this output is taken up, and a finished one left as it is"),
    "steps": (int, "Training steps"),
    "episodes": (int, "How many episodes are used, from the first; without it, all"),
    "held_out": (float, "Share of the episodes of each task on which the loss is only measured"),
    "learning_rate": (float, "Highest learning rate; without it, the checkpoint's"),
    "options": (list[str], "More options of lerobot-train, as --policy.optimizer_grad_clip_norm=10; several as A,B"),
    "heads": (list[str], "Heads of the checkpoint by task, as TASK:=FOLDER,TASK:=FOLDER"),
    "criterion": (str, "Score to remove by: cka, mse, cosine, random or keep-first"),
}

NodeArguments = dict[str, Any]


def node_description(
    node: str, start: Callable[[NodeArguments], list[Action]], /, *required: str, **optional: str
) -> LaunchDescription:
    """Returns the launch description of one node. Each launch argument has a description.

    Args:
        node: Name of the node and of its executable. Its default parameter file is ``config/nodes/<node>.yaml``.
        start: Returns the actions that start the node, given the keyword arguments of a ``Node`` or ``LifecycleNode``.
        *required: Names in :data:`PARAMETERS` that must be given.
        **optional: Names in :data:`PARAMETERS` with their defaults. ``""`` keeps the value of the parameter file.
    """

    def start_with_arguments(context: LaunchContext) -> list[Action]:
        values = {name: context.launch_configurations[name] for name in (*required, *optional)}
        given = {name: value for name, value in values.items() if value}
        return start(
            {
                "package": "clp_ros",
                "executable": node,
                "name": node,
                "namespace": LaunchConfiguration("namespace"),
                "parameters": [
                    ParameterFile(LaunchConfiguration("params_file"), allow_substs=False),
                    {name: _typed(name, value) for name, value in given.items()},
                ],
                "arguments": ["--ros-args", "--log-level", LaunchConfiguration("log_level")],
                "output": "screen",
                "emulate_tty": True,
            }
        )

    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, description=PARAMETERS[name][1]) for name in required),
            *(
                DeclareLaunchArgument(name, default_value=default, description=PARAMETERS[name][1])
                for name, default in optional.items()
            ),
            DeclareLaunchArgument(
                "params_file",
                default_value=str(resource_path(f"config/nodes/{node}.yaml")),
                description=f"Parameter file of the {node} node; a given argument overrides it",
            ),
            DeclareLaunchArgument("namespace", default_value="", description=f"Namespace of the {node} node"),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                description="Least severity that is logged: debug, info, warn, error or fatal",
            ),
            OpaqueFunction(function=start_with_arguments),
        ]
    )


def _typed(name: str, value: str) -> ParameterValue:
    # Typed, because launch would read an untyped value as YAML, and the task "no" would become a bool.
    kind = PARAMETERS[name][0]
    if kind == list[str]:
        value = json.dumps([part.strip() for part in value.split(",")])
    return ParameterValue(TextSubstitution(text=value), value_type=kind)
