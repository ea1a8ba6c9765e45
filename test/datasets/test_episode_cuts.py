# SPDX-License-Identifier: Apache-2.0
"""Where episodes begin and end, and their tasks: marks, silences, times, files; gaps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bag_tools
import pytest
import yaml
from robot_tools import EYE, MS, START, STATES, document, picture, recorded_states, robot, sync

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.datasets.episode_cuts import make_cut
from clp_ros.datasets.episode_tasks import make_task_source
from clp_ros.datasets.episodes import usable_ticks
from clp_ros.jobs import convert

WriteBag = Callable[..., Path]
ROBOT = robot()
MARKS, TASK = "/marks", "/task"


def mark(value: bool | str) -> Any:
    kind = "std_msgs/msg/Bool" if isinstance(value, bool) else "std_msgs/msg/String"
    return bag_tools.STORE.types[kind](value)


def recording(
    marks: list[tuple[float, bool | str]],
    silent: tuple[float, float] = (0, 0),
    tasks: list[tuple[float, str]] | None = None,
) -> list[tuple[str, Any, int]]:
    """Two seconds at 50 Hz, with marks at given seconds, and silence in between."""
    messages = [(MARKS, mark(value), START + round(second * 1e9)) for second, value in marks]
    messages += [(TASK, mark(text), START + round(second * 1e9)) for second, text in tasks or []]
    for step in range(100):
        if not silent[0] <= step / 50 < silent[1]:
            stamp = START + step * 20 * MS
            messages += [(STATES, recorded_states(stamp), stamp), (EYE, picture(stamp, step), stamp)]
    return sorted(messages, key=lambda one: one[2])


@pytest.mark.parametrize(
    ("how", "marks", "silent", "expected"),
    [
        ("bag", [], (0, 0), [(0, 1.98)]),
        ("topic:/marks", [(0.2, "a"), (1, "b"), (1.5, "Stop")], (0, 0), [(0.2, 1), (1, 1.5)]),
        ("topic:/marks", [(0.2, "a"), (1, "a")], (0, 0), [(0.2, 1), (1, 1.98)]),
        ("topic:marks", [(0.2, True), (0.4, True), (1, False), (1.5, True)], (0, 0), [(0.2, 1), (1.5, 1.98)]),
        ("silence:0.3", [(0.8, "no message of the robot")], (0.5, 1), [(0, 0.48), (1, 1.98)]),
        ("silence:0.6", [], (0.5, 1), [(0, 1.98)]),
        ("times:0.5,1,7", [], (0, 0), [(0.5, 1), (1, 1.98)]),
    ],
)  # fmt: skip
def test_windows(
    write_bag: WriteBag, how: str, marks: list[Any], silent: tuple[float, float], expected: list[tuple[float, float]]
) -> None:
    reader = open_bag(write_bag(recording(marks, silent)))
    cut = make_cut(how)(reader)
    usable_ticks(reader, ROBOT, listen=cut.listen(list(ROBOT.demonstration_topics)))
    windows = [((one.begin_ns - START) / 1e9, (one.end_ns - START) / 1e9) for one in cut.windows()]
    assert windows == [pytest.approx(one, abs=1e-8) for one in expected]


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("bags", "is no way to cut"),
        ("silence:long", "'long' is not a number of seconds"),
        ("silence:-1", "is no way to cut"),
        ("times:2,1", "are not ascending times"),
        ("times:gone.csv", "the file cannot be read"),
    ],
)
def test_a_wrong_way_to_cut_is_refused_at_once(how: str, fault: str) -> None:
    with pytest.raises(ClpError, match=fault):
        make_cut(how)


def test_a_cut_refuses_bags_that_it_does_not_fit(write_bag: WriteBag, tmp_path: Path) -> None:
    reader = open_bag(write_bag(recording([(1, "stop")])))
    with pytest.raises(ClpError, match=r"topic /mark is not in the bag.*did you mean '/marks'"):
        make_cut("topic:/mark")(reader).listen([])
    with pytest.raises(ClpError, match="has the type sensor_msgs/msg/JointState"):
        make_cut(f"topic:{STATES}")(reader).listen([])
    with pytest.raises(ClpError, match="no message of /marks begins an episode"):
        make_cut("topic:/marks")(reader).windows()
    with pytest.raises(ClpError, match="after its end"):
        make_cut("times:5")(reader).windows()
    table = tmp_path / "times.csv"
    for rows, fault in (
        ("x,0,1", "no episode of bag"),
        (f"{reader.path.name},0,1\n{reader.path.name},0.5,2", "overlap"),
    ):
        table.write_text(f"bag,start,end\n{rows}\n")
        with pytest.raises(ClpError, match=fault):
            make_cut(f"times:{table}")(reader).windows()


def test_tasks_from_a_topic(write_bag: WriteBag) -> None:
    reader = open_bag(write_bag(recording([], tasks=[(0.3, "push"), (0.9, " "), (1, "lift")])))
    tasks = make_task_source("topic:/task", ROBOT)(reader)
    usable_ticks(reader, ROBOT, listen=tasks.listen())
    at = [START + round(second * 1e9) for second in (0, 0.2, 0.3, 0.95, 1, 2)]
    assert tasks.task(at[0], at[2], None) == "push"  # the first during the episode
    assert tasks.task(at[3], at[5], None) == "push"
    assert tasks.task(at[4], at[5], None) == "lift"
    with pytest.raises(ClpError, match=r"/task has no text for the episode at 0.0 s"):
        tasks.task(at[0], at[1], None)


def test_one_bag_becomes_episodes_with_their_own_tasks(write_bag: WriteBag, tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(document(sync("asof", 100), sync("asof", 100))))
    # A silence of half a second in the second episode: what is before it is too short to keep.
    bag = write_bag(recording([(0.0, "push"), (0.72, "lift"), (1.9, "")], silent=(0.9, 1.3)))
    options: dict[str, Any] = {"embodiment": tmp_path / "robot.yaml", "images": "png", "bags": (bag,)}
    marked = convert.ConvertRequest(output=tmp_path / "a", episodes_by="topic:/marks", task="topic:/marks", **options)
    result = convert.run(marked)
    assert [(one.task, one.frames) for one in result.added] == [("push", 36), ("lift", 30)]
    (note,) = result.notes
    assert "inputs are missing from 1.0 s for 0.3" in note
    assert "/eye: older than 100 ms" in note
    table = tmp_path / "times.csv"
    table.write_text(f"bag,start,end,instruction\n{bag.name},1.4,1.8,second\n{bag.name},0,0.5,first\n")
    given = convert.ConvertRequest(output=tmp_path / "b", episodes_by=f"times:{table}", **options)
    assert [(one.task, one.frames) for one in convert.run(given).added] == [("first", 25), ("second", 20)]
