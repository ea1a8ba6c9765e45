# SPDX-License-Identifier: Apache-2.0
"""Tasks by name, by file, and as plain text."""

from pathlib import Path

import pytest
from robot_tools import robot

from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.task import load_task

SHIPPED = sorted(path.stem for path in resource_path("config/tasks").glob("*.yaml"))


GROCERIES = ["tomato can", "coffee bag", "garlic powder", "ketchup", "mayonnaise", "mustard", "olive oil", "spam can"]
CHOICES = [f"groceries_to_basket:{name.replace(' ', '_')}" for name in GROCERIES]
# The paper's Table 7: episodes, embodiment, number of cameras, first words of the instruction.
TABLE_7 = {
    "groceries_to_basket": (2800, "ur10e", 2, "Pick up the tomato can and place"),
    "open_kettle": (300, "ur10e", 2, "Open the lid"),
    "close_kettle": (300, "ur10e", 2, "Close the lid"),
    "serve_napkin": (100, "ur5", 2, "Pull napkin out"),
    "screwdriver_to_basket": (100, "ur5", 2, "Pick up screwdriver"),
    "banana_in_pot": (150, "aloha_single", 2, "Use the right gripper to pick up the banana"),
    "cube_to_drawer": (150, "aloha_single", 2, "Use the right gripper to open the top drawer"),
    "block_stacking": (151, "aloha_single", 2, "Pick up the yellow triangular block"),
    "fold_shorts": (202, "aloha_bimanual", 3, "Use both grippers to fold the shorts"),
    "fly_towel": (101, "aloha_bimanual", 3, "Use both grippers to grasp two corners"),
}


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "groceries_to_basket"] + CHOICES)
def test_shipped_tasks_fit_their_embodiments(name: str) -> None:
    task = load_task(name)
    assert task.instruction == " ".join(task.instruction.split())
    assert task.instruction.endswith(".")
    assert "{" not in task.instruction
    robot = load_embodiment(task.embodiment)
    assert load_task(name, robot) == task
    assert set(task.cameras) == set(robot.cameras)
    file, _, chosen = name.partition(":")
    path = resource_path(f"config/tasks/{file}.yaml")
    assert load_task(f"{path}:{chosen}" if chosen else path) == task


def test_the_ten_tasks_of_the_paper() -> None:
    assert set(SHIPPED) == {*TABLE_7, "transfer_cube"}
    for name, (episodes, embodiment, cameras, words) in TABLE_7.items():
        task = load_task("groceries_to_basket:tomato_can" if name == "groceries_to_basket" else name)
        assert (task.episodes, task.embodiment, len(task.cameras)) == (episodes, embodiment, cameras), name
        assert task.execution_length == 10
        assert task.instruction.startswith(words)


def test_a_task_of_several_objects() -> None:
    wanted = {load_task(choice).instruction for choice in CHOICES}
    assert wanted == {f"Pick up the {name} and place them in the grey bin." for name in GROCERIES}


@pytest.mark.parametrize("name", sorted(TABLE_7))
def test_a_task_on_another_robot_is_refused_with_both_named(name: str) -> None:
    its = TABLE_7[name][1]
    name = "groceries_to_basket:ketchup" if name == "groceries_to_basket" else name
    for other in {entry[1] for entry in TABLE_7.values()} - {its}:
        with pytest.raises(ClpError, match=f"the task is for {its}, but the robot is {other}"):
            load_task(name, load_embodiment(other))


def test_text_with_a_space_is_the_instruction() -> None:
    for text in ("Pick up the cube.", "use left/right arm", "two\nlines", "  fold it  "):
        task = load_task(text, robot())
        assert task.instruction == text.strip()
        assert task.embodiment is None
    assert load_task("fold_shorts").instruction != "fold_shorts"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the task is empty"),
        (" \n", "the task is empty"),
        ("fold_short", "did you mean 'fold_shorts'"),
        ("zzz", "known: .*fold_shorts"),
        ("none.yaml", "none.yaml: no such file"),
        ("my tasks/none.yaml", "no such file"),
        ("my tasks/none.yaml:ketchup", "my tasks/none.yaml: no such file"),
        ("groceries_to_basket", "the task needs an object .*known: coffee_bag, .*tomato_can; write TASK:OBJECT"),
        ("groceries_to_basket:", "the task needs an object"),
        ("groceries_to_basket:tomato", "has no object 'tomato' .*did you mean 'tomato_can'"),
        ("Put the {object} in the bin.", "is not an instruction .*objects"),
        ("~no_such_user/mine.yaml", "no such file"),
        ("fold_shorts:shirt", "the task has no objects to choose from, but 'shirt' is given"),
    ],
)
def test_tasks_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ClpError, match=message):
        load_task(text)


def write(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "my tasks"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, "embodiment: small_arm\ninstruction: Wave.\ncameras: [eye]\n")
    task = load_task(path, robot())
    assert (task.instruction, task.execution_length) == ("Wave.", 10)
    with pytest.raises(ClpError, match=r"mine\.yaml: the task is for small_arm, but the robot is aloha_bimanual"):
        load_task(path, load_embodiment("aloha_bimanual"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("embodiment: small_arm\ninstruction: Wave.\ncameras: [eye, nose]\n", "small_arm has no camera 'nose'"),
        ("instruction: Wave.\ncameras: [eye, nose]\n", "small_arm has no camera 'nose'"),
        ("instruction: ''\n", "'instruction'"),
        ("instruction: '  '\n", "'instruction'"),
        ("embodiment: small_arm\n", "'instruction': is missing"),
        ("instruction: Wave.\nexecution_length: 0\n", "'execution_length'"),
        ("instruction: Wave.\nexecution_length: 2.5\n", "'execution_length'"),
        ("instruction: Wave.\nepisodes: -1\n", "'episodes'"),
        ("instruction: Wave.\nexecution_lenght: 3\n", "did you mean 'execution_length'"),
        ("instruction: Wave.\ncameras: eye\n", "'cameras'"),
        ("instruction: 'Take the {object}.'\n", "objects and {object} in the instruction go together"),
        ("instruction: Take it.\nobjects: [cup]\n", "objects and {object} in the instruction go together"),
        ("instruction: 'Take the {object}.'\nobjects: ['a:b']\n", "'objects.0'"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ClpError, match=message) as fault:
        load_task(path, robot())
    assert str(path) in str(fault.value)
