# SPDX-License-Identifier: Apache-2.0
"""The policy node's parameters that say how chunks are joined: today's, and those of the release before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
import yaml
from rclpy.node import Node
from rclpy.parameter import Parameter

from clp_ros.control.chunk_schedule import ScheduleSettings
from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.nodes import policy_settings
from clp_ros.nodes.parameters import declare, declare_old
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.task import load_task


@pytest.fixture
def context(ros_domain: int) -> Iterator[rclpy.Context]:
    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=ros_domain)
    yield context
    context.shutdown()


def settings_of(context: rclpy.Context, **parameters: object) -> tuple[ScheduleSettings, list[str]]:
    """The settings of a node that was started with parameters, and its warnings."""
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    node = Node("policy", context=context, parameter_overrides=overrides)
    warnings: list[str] = []
    node.get_logger().warning = warnings.append
    declare(node, policy_settings.PARAMETERS, read_only=False)
    declare_old(node, policy_settings.OLD_PARAMETERS)
    try:
        return policy_settings.schedule(node), warnings
    finally:
        node.destroy_node()


def test_the_defaults_are_those_of_the_schedule(context: rclpy.Context) -> None:
    assert settings_of(context) == (ScheduleSettings(), [])


def test_parameters_of_the_release_before_are_accepted_with_a_warning(context: rclpy.Context) -> None:
    old = {"start_distance": 0.5, "lead": 0.05, "blend_steps": 5, "too_fast": "refuse", "max_scale": 2.0}
    found, warnings = settings_of(context, **old)
    assert found == ScheduleSettings(start_distance=0.5, send_lead_time_s=0.05)
    assert len(warnings) == len(old)
    for name, instead in (("start_distance", "max_deviation"), ("lead", "send_lead_time"), ("max_scale", "remove it")):
        (line,) = [one for one in warnings if f"the parameter {name} " in one]
        assert instead in line
    # One number is a number of either type.
    assert settings_of(context, start_distance=1)[0].start_distance == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_deviation": 0.0}, "max_deviation is 0.0"),
        ({"send_lead_time": -0.1}, "send_lead_time is -0.1"),
        ({"start_distance": "far"}, "start_distance is 'far'"),
        ({"lead": -1.0}, "lead is -1.0"),
    ],
)
def test_wrong_ones_are_refused(context: rclpy.Context, wrong: dict, words: str) -> None:
    with pytest.raises(ClpError, match=words):
        settings_of(context, **wrong)


def test_the_rehearsals_parameter_file_has_todays_parameters_only() -> None:
    text = resource_path("config/nodes/rehearsal.yaml").read_text(encoding="utf-8")
    for name, value in yaml.safe_load(text)["/**"]["ros__parameters"].items():
        assert type(value) is type(policy_settings.PARAMETERS[name][0]), name


def test_heads_are_folders_by_instruction(context: rclpy.Context) -> None:
    robot = load_embodiment("aloha_bimanual")

    def heads(*entries: str) -> dict[str, Path]:
        overrides = [Parameter("heads", value=list(entries))]
        node = Node("policy", context=context, parameter_overrides=overrides)
        declare(node, policy_settings.PARAMETERS, read_only=False)
        try:
            return policy_settings.given_heads(node, robot)
        finally:
            node.destroy_node()

    assert heads("") == {}
    task = load_task("transfer_cube", robot).instruction
    found = heads("transfer_cube:=/heads/a", "Fold, then stop. :=/heads/b")
    assert found == {task: Path("/heads/a"), "Fold, then stop.": Path("/heads/b")}
    with pytest.raises(ClpError, match="write TASK:=FOLDER"):
        heads("transfer_cube")
    with pytest.raises(ClpError, match="two heads"):
        heads("transfer_cube:=/a", f"{task}:=/b")
