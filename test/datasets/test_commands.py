# SPDX-License-Identifier: Apache-2.0
"""Actions out of topics with commands: against an independent interpolation, and the same wherever they are read."""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bag_tools
import numpy as np
import pytest
import yaml
from robot_tools import EYE, MS, START, STATES, document, picture, recorded_states, sync
from scipy.interpolate import BPoly

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import Frame, Steps, TickCounts, read_episode, read_frames, usable_ticks
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.observation import ObservationBuffer

PERIOD = 20 * MS
ARM, GRIPPER, LEADER = "/arm/joint_trajectory", "/gripper/commands", "/leader/joint_states"
TRAJECTORY, ARRAY, STATE = (
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "sensor_msgs/msg/JointState",
)
TYPES = bag_tools.STORE.types
WriteBag = Callable[..., Path]
State = tuple[np.ndarray, np.ndarray, np.ndarray]


def with_actions(topics: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return document(**kwargs) | {"actions": {"topics": topics}}


def entry(topic: str, kind: str, joints: list[Any] | None = None, **how: Any) -> dict[str, Any]:
    found = {"topic": topic, "type": kind, "sync": how.pop("sync", sync())} | how
    return found if joints is None else found | {"joints": joints}


def arm_and_gripper(stamp: str = "header") -> Embodiment:
    """The arm by trajectories; the gripper, a normalised joint of 0.02 to 0.06 m, by an array."""
    return Embodiment.model_validate(
        with_actions(
            {
                "arm": entry(ARM, TRAJECTORY, controllers=["arm"], sync=sync(stamp=stamp)),
                "gripper": entry(GRIPPER, ARRAY, ["finger"], sync=sync("asof", 100.0, "receive")),
            }
        )
    )


def array_message(values: list[float]) -> Any:
    return TYPES[ARRAY](TYPES["std_msgs/msg/MultiArrayLayout"]([], 0), np.array(values, float))


def trajectory_message(names: list[str], times_ns: list[int], values: list[list[np.ndarray]], stamp_ns: int) -> Any:
    """``values``: by point, its positions, and velocities and accelerations as far as there are any."""
    none = np.empty(0)
    points = [
        TYPES["trajectory_msgs/msg/JointTrajectoryPoint"](
            *[*given, none, none, none][:3],
            none,
            TYPES["builtin_interfaces/msg/Duration"](time // 10**9, time % 10**9),
        )
        for time, given in zip(times_ns, values, strict=True)
    ]
    return TYPES[TRAJECTORY](bag_tools.header(stamp_ns), names, points)


def joined(t0: int, start: list[np.ndarray], t1: int, end: list[np.ndarray], at: int) -> State:
    """scipy's polynomial through the derivatives that both points have."""
    count = min(len(start), len(end))
    ends = np.array([start[:count], end[:count]])
    curve = BPoly.from_derivatives([0.0, (t1 - t0) / 1e9], ends)
    return tuple(curve((at - t0) / 1e9, nu=order) for order in range(3))


class Followed:
    """The rule in words: the newest trajectory, begun at what was commanded when it came; looked up anew each time."""

    def __init__(self, measured: np.ndarray) -> None:
        self.measured = measured
        self.sent: list[tuple[int, int, list[int], list[list[np.ndarray]]]] = []  # received, start, times, points

    def at(self, time: int, last: int | None = None) -> State:
        number = len(self.sent) - 1 if last is None else last
        while number >= 0 and self.sent[number][0] > time:
            number -= 1
        if number < 0:
            return self.measured, np.zeros(2), np.zeros(2)
        received, start, times, points = self.sent[number]
        times = [start + one for one in times]
        if time >= times[-1]:
            given = points[-1]
            return tuple(given[order] if order < len(given) else np.zeros(2) for order in range(3))
        after = next(i for i, one in enumerate(times) if time < one)
        if after == 0:
            before = list(self.at(received, number - 1))
            return joined(received, before, times[0], points[0], time)
        return joined(times[after - 1], points[after - 1], times[after], points[after], time)


@pytest.mark.parametrize("seed", range(6))
def test_trajectories_are_followed_as_a_controller_follows_them(write_bag: WriteBag, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stamp = ("header", "receive")[seed % 2]
    followed = Followed(np.array([1.0, 2.0]))
    messages = []
    for step in range(100):
        now = START + step * PERIOD
        messages.append((STATES, recorded_states(now), now))
        messages.append((EYE, picture(now), now))
        messages.append((GRIPPER, array_message([0.02 + 0.04 * step / 100]), now + MS))
    now = START + 100 * MS
    while now < START + 1900 * MS:
        count = int(rng.integers(1, 5))
        times = np.cumsum(rng.integers(10, 200, count)) * MS
        orders = rng.integers(1, 4, count).tolist() if rng.random() < 0.5 else [int(rng.integers(1, 4))] * count
        points = [[rng.normal(size=2) for _ in range(order)] for order in orders]
        begin = int(rng.choice([0, now - 5 * MS, now + 30 * MS]))
        start = begin if begin and stamp == "header" else now
        names = ["waist", "elbow", "other"]
        order = rng.permutation(3)
        sent = [[np.append(value, 7.0)[order] for value in point] for point in points]
        message = trajectory_message([names[i] for i in order], times.tolist(), sent, begin)
        messages.append((ARM, message, now))
        followed.sent.append((now, start, times.tolist(), points))
        now += int(rng.integers(1, 300)) * MS + int(rng.integers(1, 999_999))
    messages.sort(key=lambda item: item[2])
    bag = write_bag(messages, storage=("mcap", "sqlite3")[seed % 2])
    counts = TickCounts()
    frames = list(read_episode(open_bag(bag), arm_and_gripper(stamp), counts=counts))
    assert not counts.dropped
    assert counts.usable == len(frames) > 90
    assert counts.unusable == {"/arm/joint_trajectory: no message yet": 5}
    for frame in frames:
        tick = frame.observation.tick_ns
        expected = followed.at(tick)[0]
        step = (tick - MS - START) // PERIOD
        assert np.allclose(frame.action, [step / 100, *expected], rtol=1e-5, atol=1e-6)
        assert frame.action.dtype == np.float32
        assert frame.action_is_pad.tolist() == [False]
        newest = max(sent[0] for sent in followed.sent if sent[0] <= tick)
        began = next(sent[1] for sent in followed.sent if sent[0] == newest)
        assert frame.action_stamps == {ARM: began, GRIPPER: START + step * PERIOD + MS}


def leader(stamp: int, **positions: float) -> Any:
    return bag_tools.joint_state(list(positions), list(positions.values()), stamp)


def leader_arm(policy: str = "asof", tolerance: float | None = 50.0) -> Embodiment:
    joints = [
        {"joint": "finger", "name": "trigger", "zero": 0.8, "one": -0.2},
        "elbow",
        {"joint": "arm/waist", "name": "yaw"},
    ]
    how = entry(LEADER, STATE, joints, sync=sync(policy, tolerance))
    return Embodiment.model_validate(with_actions({"leader": how}))


def led(steps: int, lost: Callable[[int], bool] = lambda _: False) -> list[tuple[str, Any, int]]:
    """A demonstration by a leader arm, whose trigger comes in messages of its own; waist, elbow: step, -step."""
    messages = []
    for step in range(steps):
        now = START + step * PERIOD
        messages += [(STATES, recorded_states(now, waist=step), now), (EYE, picture(now, step), now)]
        if not lost(step):
            messages.append((LEADER, leader(now, elbow=-step, yaw=step + 0.5, more=3.0), now))
        messages.append((LEADER, leader(now, trigger=0.8 - step / 100), now))
    return messages


def test_a_leader_arm(write_bag: WriteBag) -> None:
    reader = open_bag(write_bag(led(60)))
    frames = list(read_episode(reader, leader_arm()))
    assert len(frames) == 60
    for step, frame in enumerate(frames):
        assert np.allclose(frame.action, [step / 100, step + 0.5, -step], rtol=1e-6)
        assert frame.observation.state[1] == step
        assert frame.action_stamps == {LEADER: START + step * PERIOD}
        assert frame.observation.stamps == {STATES: START + step * PERIOD, EYE: START + step * PERIOD}
    # The other source, of the same robot and bag: the state a step later. The last one has none.
    following = list(read_episode(reader, leader_arm().with_action_source("next_state")))
    assert [frame.action[1] for frame in following] == [*range(1, 60), 59]
    assert [bool(frame.action_is_pad[0]) for frame in following] == [False] * 59 + [True]
    assert not any(frame.action_stamps for frame in following)


def equal(one: Frame, other: Frame) -> None:
    assert one.observation.tick_ns == other.observation.tick_ns
    assert one.observation.stamps == other.observation.stamps
    assert one.action_stamps == other.action_stamps
    assert one.piece == other.piece
    assert np.array_equal(one.observation.state, other.observation.state)
    for feature, pixels in one.observation.images.items():
        assert np.array_equal(pixels, other.observation.images[feature])
    assert np.array_equal(one.actions[0], other.actions[0])
    assert one.action_is_pad[0] == other.action_is_pad[0]


@pytest.mark.parametrize("source", ["next_state", "topics"])
def test_episode_calibration_and_live_frames_are_the_same(write_bag: WriteBag, source: str) -> None:
    rng, chunk = np.random.default_rng(1), 8
    messages = led(120, lambda step: 50 <= step < 60 or step % 13 == 0)
    # Lost, late, and a pause of two seconds.
    messages = [m for m in messages if rng.random() < 0.9]
    messages = [(topic, m, at + int(rng.integers(0, 15)) * MS) for topic, m, at in messages]
    later = [(topic, m, at) for topic, m, at in led(30)]
    shift = 4_000 * MS
    for topic, message, at in later:
        stamp = message.header.stamp
        message.header.stamp = type(stamp)(stamp.sec + shift // 10**9, stamp.nanosec)
        messages.append((topic, message, at + shift))
    messages.sort(key=lambda item: item[2])
    embodiment = leader_arm("asof", 30.0).with_action_source(source)
    reader = open_bag(write_bag(messages))
    counts, steps = TickCounts(), Steps(embodiment.period_ns)
    episode = list(read_episode(reader, embodiment, counts=counts))
    scan = usable_ticks(reader, embodiment, steps=steps)
    ticks = [frame.observation.tick_ns for frame in episode]
    assert ticks == scan.usable.tolist() == steps.ticks
    assert (counts.unusable, counts.dropped) == (scan.unusable, scan.dropped)
    assert {frame.piece for frame in episode} == {0, 1}
    assert ("/leader/joint_states: older than 30 ms" in counts.unusable) == (source == "topics")
    if source == "topics":
        assert np.array_equal(steps.actions, [frame.action for frame in episode])

    calibration = list(read_frames(reader, embodiment, ticks, chunk))
    reservoir = FrameReservoir(embodiment, len(ticks), chunk)
    for message in reader.messages(list(embodiment.demonstration_topics)):
        reservoir.add(message.topic, message.data, message.receive_ns)
    live = list(reservoir.frames())
    assert reservoir.unusable == counts.unusable
    known = {(f.piece, f.observation.tick_ns): f for f in episode}
    for one, drawn, received in zip(episode, calibration, live, strict=True):
        equal(one, drawn)
        equal(one, received)
        assert np.array_equal(drawn.actions, received.actions)
        assert np.array_equal(drawn.action_is_pad, received.action_is_pad)
        # The rest of a chunk is the actions of the frames that follow.
        for step in range(chunk):
            later_one = known.get((one.piece, one.observation.tick_ns + step * PERIOD))
            if later_one is not None and not later_one.action_is_pad[0]:
                assert np.array_equal(drawn.actions[step], later_one.action)
                assert not drawn.action_is_pad[step]
    # What the policy node makes observations with, given every input that was received by a tick.
    buffer, received = ObservationBuffer(embodiment), deque(reader.messages(list(embodiment.topics)))
    for one in episode:
        while received and received[0].receive_ns <= one.observation.tick_ns:
            message = received.popleft()
            buffer.add(message.topic, message.data, message.receive_ns)
        equal(one, replace(one, observation=buffer.observe(one.observation.tick_ns)))
    few = ticks[3::17]
    for one, tick in zip(read_frames(reader, embodiment, few, chunk), few, strict=True):
        equal(one, known[one.piece, tick])


def test_a_recording_of_others(shared_data: Path) -> None:
    described = load_embodiment(Path(__file__).parents[1] / "data" / "wx200_pr2.yaml").model_dump()
    states = next(iter(described["joint_states"].values()))
    # Its JointStates taken for those of a leader: then it follows exactly.
    described["actions"] = {"topics": {"leader": {"topic": states["topic"], "type": STATE, "sync": states["sync"]}}}
    embodiment = Embodiment.model_validate(described)
    counts = TickCounts()
    reader = open_bag(shared_data / "bags" / "wx200_pr2_composite")
    frames = list(read_episode(reader, embodiment, counts=counts))
    assert len(frames) == counts.usable > 450
    assert not counts.dropped
    for frame in frames:
        assert np.array_equal(frame.action, frame.observation.state)
        assert frame.action_stamps == {states["topic"]: frame.observation.stamps[states["topic"]]}
    moved = np.array([frame.action for frame in frames])
    assert np.ptp(moved, axis=0).max() > 0.01


def test_an_episode_is_read_as_it_is_asked_for(write_bag: WriteBag) -> None:
    received: list[str] = []
    messages = led(50)
    messages[20:20] = [("/mark", bag_tools.string("grasp"), messages[20][2])]
    messages.insert(0, ("/mark", bag_tools.string("begin"), START - 10 * 10**9))
    reader = open_bag(write_bag(messages))
    frames = read_episode(reader, leader_arm(), listen={"/mark": lambda message: received.append(message.data.data)})
    first = next(frames)
    assert first.observation.tick_ns == START  # a topic that is only listened to begins no tick
    assert received == ["begin"]
    assert len(list(frames)) == 49
    assert received == ["begin", "grasp"]


def test_commands_that_no_controller_follows_are_counted(write_bag: WriteBag) -> None:
    one = [np.ones(2)]
    bad: list[tuple[str, Any, str]] = [
        (ARM, trajectory_message(["waist"], [0], [[np.ones(1)]], START - 10**9), "refuses it: the trajectory ended 1."),
        (ARM, trajectory_message(["waist", "elbow"], [0, 0], [one, one], 0), "refuses it: point 1 is not after"),
        (ARM, trajectory_message(["waist", "elbow"], [], [], 0), "refuses it: the trajectory has no points"),
        (ARM, trajectory_message(["a", "b"], [0], [one], 0), "joint 'waist' is not in the trajectory (it has a, b)"),
        (ARM, trajectory_message(["waist", "waist"], [0], [one], 0), "a joint is in the trajectory twice"),
        (ARM, trajectory_message(["waist", "elbow"], [0], [[np.ones(3)]], 0), "3 positions for 2 joints"),
        (ARM, trajectory_message(["waist", "elbow"], [0], [[np.array([1, np.inf])]], 0), "positions are not finite"),
        (ARM, trajectory_message(["waist", "elbow"], [0], [one], START + 900 * 10**9), "of another clock"),
        (GRIPPER, array_message([0.1, 0.2]), "a Float64MultiArray has 2 values for 1 joints"),
        (GRIPPER, array_message([np.nan]), "a value is not finite"),
    ]
    good = trajectory_message(["elbow", "waist"], [100 * MS], [[np.array([4.0, 3.0])]], 0)
    messages = [(ARM, good, START + 20 * MS)]
    for step in range(20):
        now = START + step * PERIOD
        messages += [
            (STATES, recorded_states(now), now),
            (EYE, picture(now), now),
            (GRIPPER, array_message([0.04]), now),
        ]
    messages += [(topic, message, START + 25 * MS) for topic, message, _ in bad]
    messages.sort(key=lambda item: item[2])
    counts = TickCounts()
    frames = list(read_episode(open_bag(write_bag(messages)), arm_and_gripper(), counts=counts))
    assert counts.dropped.total() == len(bad)
    for topic, _, words in bad:
        assert any(reason.startswith(f"{topic}: ") and words in reason for reason in counts.dropped), words
    assert np.allclose(frames[0].action, [0.5, 1.0, 2.0])  # where the joints were when it came
    assert np.allclose(frames[-1].action, [0.5, 3.0, 4.0])


def test_what_is_missing_or_stale(write_bag: WriteBag) -> None:
    # A trajectory has the age of its end: 100 ms after START + 20 ms + 300 ms it is too old.
    embodiment = arm_and_gripper().model_dump()
    embodiment["actions"]["topics"]["arm"]["sync"] = sync("asof", 100.0)
    embodiment = Embodiment.model_validate(embodiment)
    message = trajectory_message(["elbow", "waist"], [300 * MS], [[np.array([4.0, 3.0])]], 0)
    messages = [(ARM, message, START + 20 * MS)]
    for step in range(50):
        now = START + step * PERIOD
        if step >= 4:  # the first trajectory comes before any state: where it begins is not known
            messages.append((STATES, recorded_states(now), now))
        messages += [(EYE, picture(now), now), (GRIPPER, array_message([0.04]), now)]
    messages.sort(key=lambda item: item[2])
    bag = write_bag(messages)
    episode = usable_ticks(open_bag(bag), embodiment)
    assert (episode.usable - START).tolist() == [step * PERIOD for step in range(16, 22)]
    assert episode.unusable == {
        "/states: no message yet": 4,
        f"{ARM}: before the first point of its first trajectory": 12,
        f"{ARM}: older than 100 ms": 28,
    }
    lacking = write_bag([m for m in messages if m[0] != GRIPPER])
    with pytest.raises(ClpError, match=f"topic {GRIPPER} is not in the bag"):
        list(read_episode(open_bag(lacking), embodiment))
    other = write_bag([m if m[0] != GRIPPER else (GRIPPER, bag_tools.string("x"), m[2]) for m in messages])
    with pytest.raises(ClpError, match="correct its type under actions in the embodiment"):
        usable_ticks(open_bag(other), embodiment)


def test_what_an_embodiment_may_declare(tmp_path: Path) -> None:
    assert Embodiment.model_validate(document()).actions.source == "next_state"
    assert Embodiment.model_validate(document()).demonstration_topics == {EYE: "sensor_msgs/msg/Image", STATES: STATE}
    good = with_actions({"leader": entry(LEADER, "sensor_msgs/JointState")})
    robot = Embodiment.model_validate(good)
    assert robot.action_topics == {LEADER: STATE}
    assert robot.with_action_source("next_state").action_topics == {}
    with pytest.raises(ClpError, match="declares no topics with actions"):
        Embodiment.model_validate(document()).with_action_source("topics")
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(good, sort_keys=False))
    moved = load_embodiment(path, "l_", {"actions.leader": "/l/leader"})
    assert [joint.name for joint in moved.commanded_joints("leader")] == ["l_finger", "l_waist", "l_elbow"]
    assert moved.action_topics == {"/l/leader": STATE}
    path.write_text(yaml.safe_dump(leader_arm().model_dump(), sort_keys=False))
    assert [j.name for j in load_embodiment(path, "l_").commanded_joints("leader")] == ["trigger", "l_elbow", "yaw"]

    def refusal(change: Callable[[dict[str, Any]], None]) -> str:
        broken = copy.deepcopy(good)
        change(broken["actions"])
        path.write_text(yaml.safe_dump(broken, sort_keys=False))
        with pytest.raises(ClpError) as caught:
            load_embodiment(path)
        return str(caught.value)

    def topic(**fields: Any) -> Callable[[dict[str, Any]], None]:
        return lambda actions: actions["topics"]["leader"].update(fields)

    assert "unknown key 'actions.sources'" in refusal(lambda actions: actions.update(sources="topics"))
    assert "did you mean 'source'" in refusal(lambda actions: actions.update(sources="topics"))
    assert "source topics needs topics" in refusal(lambda actions: actions.update(topics={}, source="topics"))
    assert "'next_state' or 'topics'" in refusal(lambda actions: actions.update(source="leader"))
    assert "unknown key 'actions.topics.leader.joint'" in refusal(topic(joint=["waist"]))
    assert "did you mean 'joints'" in refusal(topic(joint=["waist"]))
    assert "did you mean 'zero'" in refusal(topic(joints=[{"joint": "finger", "zer": 1.0}]))
    assert "there is no joint 'waste', did you mean 'waist'?" in refusal(topic(joints=["waste"]))
    assert "there is no controller 'amr', did you mean 'arm'?" in refusal(topic(controllers=["amr"]))
    assert "none commands the joint finger" in refusal(topic(controllers=["arm"]))
    assert "none commands the joint elbow" in refusal(topic(joints=["waist", "finger"]))
    assert "is there twice" in refusal(topic(joints=["waist", "waist", "finger", "elbow"]))
    assert "a Float64MultiArray has no header" in refusal(topic(type=ARRAY, controllers=["arm"]))
    assert "a Float64MultiArray has no names: give joints" in refusal(topic(type=ARRAY, sync=sync(stamp="receive")))
    assert "zero and one belong to a joint whose unit" in refusal(
        topic(joints=[{"joint": "waist", "zero": 1.0}, "finger"])
    )
    assert "zero and one must differ" in refusal(topic(joints=[{"joint": "finger", "zero": 1.0, "one": 1.0}]))
    assert f"{EYE} is a sensor_msgs/msg/Image, not a {STATE}" in refusal(topic(topic=EYE))
    second = entry("/more", STATE, controllers=["arm"])
    assert "is commanded by actions.topics.leader and more" in refusal(lambda a: a["topics"].update(more=second))


def test_a_joint_that_several_controllers_have() -> None:
    two = copy.deepcopy(document())
    two["joint_states"]["other"] = {"topic": "/other/states", "sync": sync()}
    two["controllers"]["other"] = copy.deepcopy(two["controllers"]["arm"]) | {
        "joint_states": "other",
        "topic": "/other/arm",
    }
    names = ["other/elbow", "other/waist", "finger", "arm/waist", "arm/elbow"]
    both = entry("/all", ARRAY, names, sync=sync("hold", None, "receive"))
    robot = Embodiment.model_validate(two | {"actions": {"topics": {"all": both}}})
    assert [joint.index for joint in robot.commanded_joints("all")] == [4, 3, 0, 1, 2]
    both["joints"][3] = "waist"
    with pytest.raises(ValueError, match="the joint 'waist' is in arm and other: write arm/waist"):
        Embodiment.model_validate(two | {"actions": {"topics": {"all": both}}})
