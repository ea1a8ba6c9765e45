# SPDX-License-Identifier: Apache-2.0
"""Frames of recorded episodes, against a search over all messages; what is wrong with a bag; bounded memory."""

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bag_tools
import cv2
import numpy as np
import pytest
from robot_tools import EYE, MS, START, STATES, document, picture, recorded_states, robot, sync

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.datasets.episodes import Frame, LeftOut, read_episode, read_frames, usable_ticks
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.messages.stamps import header_stamp_ns
from clp_ros.robots.embodiment import Embodiment, load_embodiment

PERIOD = 20 * MS
ASOF = robot(sync("asof", 60.0), sync("asof", 30.0))
WriteBag = Callable[..., Path]


def recording(
    steps: int, eye_every: int = 2, start: int = START, first: int = 0, silent: Callable[[int], bool] = lambda _: False
) -> list[tuple[str, Any, int]]:
    """A state every 20 ms (waist: the step's number), a picture every second of them (its value: the number)."""
    messages = []
    for step in range(first, first + steps):
        stamp = start + (step - first) * PERIOD
        if silent(step):
            continue
        messages.append((STATES, recorded_states(stamp, waist=step), stamp + MS))
        if step % eye_every == 0:
            messages.append((EYE, picture(stamp, step), stamp + 2 * MS))
    return messages


def numbers(frame: Frame) -> list[float]:
    """The waist's position in the actions that are known."""
    assert frame.actions.dtype == np.float32
    return frame.actions[~frame.action_is_pad, 1].tolist()


def expected_frames(
    messages: list[tuple[str, Any, int]], ticks: list[int], chunk: int
) -> dict[int, tuple[int, int, list[int | None]]]:
    """By search over all messages: at each usable tick of ASOF the picture, the waist, and the waist at the next."""

    def newest(topic: str, tick: int, tolerance: int) -> int | None:
        found = [
            (header_stamp_ns(message), message)
            for name, message, receive in messages
            if name == topic and receive <= tick and header_stamp_ns(message) <= tick
        ]
        if not found or tick - max(found, key=lambda item: item[0])[0] > tolerance:
            return None
        message = max(found, key=lambda item: item[0])[1]
        return int(message.data[0]) if topic == EYE else int(message.position[2])

    waist = [newest(STATES, tick, 30 * MS) for tick in ticks]
    eye = [newest(EYE, tick, 60 * MS) for tick in ticks]
    return {
        tick: (eye[i], waist[i], [waist[j] if j < len(ticks) else None for j in range(i + 1, i + 1 + chunk)])
        for i, tick in enumerate(ticks)
        if waist[i] is not None and eye[i] is not None
    }


@pytest.mark.parametrize("seed", range(8))
def test_frames_are_those_of_a_search_over_all_messages(write_bag: WriteBag, seed: int) -> None:
    rng = np.random.default_rng(seed)
    messages = []
    for step in range(80):
        stamp = START + step * PERIOD + int(rng.integers(-5, 5)) * MS
        if rng.random() < 0.9:  # lost, late, before and after each other
            messages.append((STATES, recorded_states(stamp, waist=step), stamp + int(rng.integers(0, 15)) * MS))
        if rng.random() < 0.5:
            messages.append((EYE, picture(stamp, step), stamp + int(rng.integers(0, 90)) * MS))
    messages.sort(key=lambda item: item[2])
    reader = open_bag(write_bag(messages))
    first, last = messages[0][2], messages[-1][2]
    ticks = list(range(first, last + PERIOD, PERIOD))
    ticks = [tick for tick in ticks if tick - PERIOD < last]
    chunk = int(rng.integers(1, 30))
    expected = expected_frames(messages, ticks, chunk)
    episode = usable_ticks(reader, ASOF)
    assert episode.usable.dtype == np.int64
    assert episode.usable.tolist() == list(expected)
    assert len(ticks) - len(expected) == sum(episode.unusable.values()) > 0

    wanted = sorted(rng.choice(episode.usable, size=len(expected) // 2, replace=False).tolist())
    for choice in (list(expected), wanted):
        frames = list(read_frames(reader, ASOF, choice, chunk))
        assert [frame.observation.tick_ns for frame in frames] == choice
        for frame in frames:
            eye, waist, following = expected[frame.observation.tick_ns]
            assert (frame.observation.images["observation.images.eye"] == eye).all()
            assert np.allclose(frame.observation.state, [0.5, waist, 2.0], rtol=1e-6)
            assert frame.actions.shape == (chunk, 3)
            assert frame.action_is_pad.tolist() == [value is None for value in following]
            known = waist
            for got, value in zip(frame.actions, following, strict=True):
                known = known if value is None else value
                assert np.allclose(got, [0.5, known, 2.0], rtol=1e-6)


def test_actions_are_the_states_that_follow_and_padding_says_where_there_is_none(write_bag: WriteBag) -> None:
    messages = recording(20, silent=lambda step: step in (10, 11, 12))
    reader = open_bag(write_bag(messages))
    frames = list(read_frames(reader, ASOF, usable_ticks(reader, ASOF).usable.tolist(), 6))
    by_waist = {int(frame.observation.state[1]): frame for frame in frames}
    assert numbers(by_waist[2]) == [3, 4, 5, 6, 7, 8]
    # Steps 10 to 12 are not there; the state of step 9 serves for 30 ms.
    assert by_waist[7].action_is_pad.tolist() == [False, False, False, True, True, False]
    assert by_waist[7].actions[:, 1].tolist() == [8, 9, 9, 9, 9, 13]
    last = frames[-1]
    assert last.action_is_pad.all()
    assert (last.actions == last.observation.state).all()


def test_which_ticks_are_usable_does_not_depend_on_the_pictures(write_bag: WriteBag) -> None:
    messages = recording(30)
    broken = [
        (topic, bag_tools.image(np.zeros((1, 1), np.uint8), "32FC1", stamp_ns=header_stamp_ns(message)), at)
        if topic == EYE
        else (topic, message, at)
        for topic, message, at in messages
    ]
    whole, other = (usable_ticks(open_bag(write_bag(part)), ASOF) for part in (messages, broken))
    assert whole.usable.tolist() == other.usable.tolist()


def test_an_encoding_that_cannot_be_read_is_an_error(write_bag: WriteBag) -> None:
    messages = [
        (topic, bag_tools.image(np.zeros((2, 2), np.uint8), "16UC1", 1, header_stamp_ns(message)), at)
        if topic == EYE
        else (topic, message, at)
        for topic, message, at in recording(60)
    ]
    path = write_bag(messages)
    reader = open_bag(path)
    ticks = usable_ticks(reader, ASOF).usable.tolist()
    for few in (ticks[:1], ticks[:2], ticks):
        with pytest.raises(ClpError, match=r"/eye: .*'16UC1' cannot be read.* \(hint: use ") as fault:
            list(read_frames(reader, ASOF, few, 5))
        assert str(path) in str(fault.value)


def damaged(messages: list[tuple[str, Any, int]], steps: set[int]) -> list[tuple[str, Any, int]]:
    """The recording with some pictures cut off."""
    for topic, message, _ in messages:
        if topic == EYE and int(message.data[0]) in steps:
            message.data = message.data[:5]
    return messages


def test_a_damaged_picture_costs_its_frames_and_is_counted(write_bag: WriteBag) -> None:
    reader = open_bag(write_bag(damaged(recording(100), {40, 42})))
    ticks = usable_ticks(reader, ASOF).usable.tolist()
    left_out = LeftOut(len(ticks))
    frames = list(read_frames(reader, ASOF, ticks, 3, left_out))
    ((reason, count),) = left_out.dropped.items()
    assert reason.startswith("/eye: an image of 2x2 in the encoding rgb8 with step 6 cannot have 5 bytes")
    assert count == 4
    assert len(frames) == len(ticks) - 4
    assert not {40, 42} & {int(frame.observation.images["observation.images.eye"][0, 0, 0]) for frame in frames}
    # The frames before carry the actions all the same.
    (before,) = [frame for frame in frames if frame.observation.state[1] == 39]
    assert numbers(before) == [40, 41, 42]


def test_a_reservoir_leaves_the_same_frames_out(write_bag: WriteBag) -> None:
    path = write_bag(damaged(recording(100), {40, 42}))
    reader = open_bag(path)
    left_out = LeftOut(100)
    expected = list(read_frames(reader, ASOF, usable_ticks(reader, ASOF).usable.tolist(), 3, left_out))
    reservoir = FrameReservoir(ASOF, 1000, 3)
    for message in reader.messages():
        reservoir.add(message.topic, message.data, message.receive_ns)
    frames = list(reservoir.frames())
    assert [frame.observation.tick_ns for frame in frames] == [frame.observation.tick_ns for frame in expected]
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(frames, expected, strict=True))
    assert reservoir.dropped == left_out.dropped
    reservoir = FrameReservoir(ASOF, 5, 3)
    for message in open_bag(write_bag(damaged(recording(100), set(range(100))))).messages():
        reservoir.add(message.topic, message.data, message.receive_ns)
    with pytest.raises(ClpError, match=r"^/eye: 2 of 5 frames cannot be decoded: an image of 2x2"):
        list(reservoir.frames())


def test_many_damaged_pictures_are_an_error(write_bag: WriteBag) -> None:
    reader = open_bag(write_bag(damaged(recording(100), set(range(40, 60)))))
    ticks = usable_ticks(reader, ASOF).usable.tolist()
    with pytest.raises(ClpError, match=r": 10 of 9\d frames cannot be decoded: an image of 2x2"):
        list(read_frames(reader, ASOF, ticks, 3))
    bad = next(tick for tick in ticks if tick >= START + 41 * PERIOD)
    with pytest.raises(ClpError, match=r"/eye: an image of 2x2"):
        list(read_frames(reader, ASOF, [bad], 3))
    assert len(list(read_frames(reader, ASOF, [ticks[0], bad], 3))) == 1


def test_damaged_pictures_count_over_all_episodes(write_bag: WriteBag) -> None:
    # One frame of each of ten episodes: one that is damaged is one of ten, not the only one.
    left_out = LeftOut(10)
    for episode in range(10):
        reader = open_bag(write_bag(damaged(recording(10), {4} if episode in (3, 7) else set())))
        tick = START + 5 * PERIOD + MS
        if episode == 7:
            with pytest.raises(ClpError, match=r": 2 of 10 frames cannot be decoded"):
                list(read_frames(reader, ASOF, [tick], 2, left_out))
        else:
            assert len(list(read_frames(reader, ASOF, [tick], 2, left_out))) == (episode != 3)


def test_a_silence_ends_the_episode(write_bag: WriteBag) -> None:
    # An hour's pause: no ticks in it, though hold would let the last frame serve; and no action crosses it.
    embodiment = robot()
    later = START + 3600 * 10**9
    path = write_bag([*recording(10), *recording(10, start=later, first=100)])
    reservoir = FrameReservoir(embodiment, 1000, 15)
    for message in open_bag(path).messages():
        reservoir.add(message.topic, message.data, message.receive_ns)
    reader = open_bag(path)
    usable = usable_ticks(reader, embodiment).usable
    assert len(usable) < 25
    assert ((usable < START + 210 * MS) | (usable >= later)).all()
    for frame, live in zip(read_frames(reader, embodiment, usable.tolist(), 15), reservoir.frames(), strict=True):
        assert frame.observation.tick_ns == live.observation.tick_ns
        assert np.array_equal(frame.actions, live.actions)
        assert np.array_equal(frame.action_is_pad, live.action_is_pad)
        known = numbers(frame)
        first = frame.observation.state[1]
        assert all((number >= 100) == (first >= 100) for number in known)
        assert frame.observation.stamps[EYE] >= frame.observation.tick_ns - 10**9


def test_a_first_message_of_another_age_costs_no_time(write_bag: WriteBag) -> None:
    # Recorded before the clock was set: fifty years of control ticks would never end.
    receive = sync(stamp="receive")
    messages = [(STATES, recorded_states(0), 10**9), *recording(10)]
    episode = usable_ticks(open_bag(write_bag(messages)), robot(receive, receive))
    assert 5 < len(episode.usable) < 15


@pytest.mark.parametrize("late", [EYE, STATES])
@pytest.mark.parametrize("side", ["starts later", "ends earlier"])
def test_topics_that_do_not_cover_each_other(write_bag: WriteBag, late: str, side: str) -> None:
    middle = START + 20 * PERIOD
    messages = [item for item in recording(40) if item[0] != late or (item[2] >= middle) == (side == "starts later")]
    reader = open_bag(write_bag(messages))
    episode = usable_ticks(reader, ASOF)
    if side == "starts later":
        assert episode.usable[0] >= middle
        assert episode.unusable[f"{late}: no message yet"] > 15
    else:
        assert episode.usable[-1] <= middle + 60 * MS
        assert sum(n for reason, n in episode.unusable.items() if reason.startswith(f"{late}: older than")) > 15
    assert list(read_frames(reader, ASOF, episode.usable.tolist(), 4))


def fault_of(path: Path, embodiment: Embodiment = ASOF) -> str:
    with pytest.raises(ClpError) as fault:
        usable_ticks(open_bag(path), embodiment)
    assert str(path) in str(fault.value)
    assert "\n" not in str(fault.value)
    assert fault.value.hint
    return str(fault.value)


def test_what_a_bag_lacks(write_bag: WriteBag) -> None:
    messages = recording(10)
    only_states = [item for item in messages if item[0] == STATES]
    assert "topic /eye is not in the bag" in fault_of(write_bag(only_states))
    renamed = [("/eyes" if topic == EYE else topic, message, at) for topic, message, at in messages]
    assert "did you mean '/eyes'?" in fault_of(write_bag(renamed))
    path = write_bag(only_states, topics={EYE: "sensor_msgs/msg/Image"})
    assert "topic /eye has no messages" in fault_of(path)
    path = write_bag(only_states, topics={EYE: "sensor_msgs/msg/CompressedImage"})
    assert (
        "topic /eye has the type sensor_msgs/msg/CompressedImage, but the embodiment needs sensor_msgs/msg/Image"
        in fault_of(path)
    )
    for topic, other, read in (
        (EYE, "sensor_msgs/msg/PointCloud2", "sensor_msgs/msg/Image or sensor_msgs/msg/CompressedImage"),
        (STATES, "std_msgs/msg/String", "sensor_msgs/msg/JointState"),
    ):
        path = write_bag([item for item in messages if item[0] != topic], topics={topic: other})
        message = fault_of(path)
        assert f"topic {topic} has the type {other}, but the embodiment needs" in message
        assert f"name a topic of type {read} in the embodiment" in message
    both = write_bag([*messages, (EYE, bag_tools.string("no picture"), messages[-1][2])])
    assert "topic /eye was recorded with two types" in fault_of(both)
    path = write_bag([], topics={EYE: "sensor_msgs/msg/Image", STATES: "sensor_msgs/msg/JointState"})
    with pytest.raises(ClpError, match="the bag has no messages"):
        open_bag(path)


def test_why_no_tick_can_be_used(write_bag: WriteBag) -> None:
    def rename(old: str, new: str) -> list[tuple[str, Any, int]]:
        messages = recording(10)
        for topic, message, _ in messages:
            if topic == STATES:
                message.name = [new if name == old else name for name in message.name]
        return messages

    message = fault_of(write_bag(rename("waist", "wrist")))
    assert ", /states: " in message
    assert ": joint 'waist' is in no JointState (they have elbow, finger, wrist) (hint: " in message
    nothing = [
        (topic, bag_tools.joint_state(["a", "b"], [1, 2], at) if topic == STATES else message, at)
        for topic, message, at in recording(10)
    ]
    message = fault_of(write_bag(nothing))
    assert (
        "no message yet; 10 of its messages are not used: joint 'finger' is not in the JointState, which has a, b"
        in message
    )
    lagging = [(topic, message, at + (5 * 10**9 if topic == EYE else 0)) for topic, message, at in recording(300)]
    message = fault_of(write_bag(sorted(lagging, key=lambda item: item[2])))
    assert "/eye" in message
    nan = recording(10)
    for topic, message, _ in nan:
        if topic == STATES:
            message.position[1] = np.nan
    assert "10 of its messages are not used: the position of joint 'finger' is not finite" in fault_of(write_bag(nan))


def in_parts(steps: int, finger_offset: Callable[[int], int]) -> list[tuple[str, Any, int]]:
    """As :func:`recording`, but with a gripper's driver of its own, whose clock is off, and a base's without stamps."""
    messages = []
    for topic, message, at in recording(steps):
        if topic != STATES:
            messages.append((topic, message, at))
            continue
        stamp = header_stamp_ns(message)
        messages.append((STATES, bag_tools.joint_state(["left_wheel"], [0.0], 0), at))
        messages.append((STATES, bag_tools.joint_state(["waist", "elbow"], [1.0, 2.0], stamp), at))
        offset = finger_offset((stamp - START) // PERIOD)
        messages.append((STATES, bag_tools.joint_state(["finger"], [0.04], stamp + offset), at))
    return messages


def test_drivers_that_share_a_topic_have_clocks_of_their_own(write_bag: WriteBag) -> None:
    episode = usable_ticks(open_bag(write_bag(in_parts(100, lambda _: 0))), ASOF)
    assert len(episode.usable) >= 98
    # The gripper's first messages were latched, or come late; from the tenth on they are young enough.
    for late in (1_500 * MS, 10 * 10**9):
        episode = usable_ticks(
            open_bag(write_bag(in_parts(100, lambda step, late=late: -late if step < 10 else 0))), ASOF
        )
        assert 88 <= len(episode.usable) <= 90
        assert episode.unusable["/states: older than 30 ms"] >= 9
    # A host that is off, one way and the other, and a clock that jumps on the way.
    behind = fault_of(write_bag(in_parts(100, lambda _: -1_200 * MS)))
    assert "joint 'finger' is 12" in behind
    assert "its stamps are always 1201 ms behind the receive stamps, as those of a host whose clock is off" in behind
    ahead = fault_of(write_bag(in_parts(100, lambda _: 1_200 * MS)))
    assert (
        "header stamps of joint 'finger' are 1.2 s ahead of the receive stamps: they are on different clocks" in ahead
    )
    for jump in (-1_200 * MS, 1_200 * MS):
        jumped = fault_of(write_bag(in_parts(100, lambda step, jump=jump: jump if step > 50 else 0)))
        way = "forwards" if jump > 0 else "backwards"
        assert f"the clock of joint 'finger' jumped {way} by 1.2 s" in jumped


def test_a_recording_whose_first_frame_came_late(shared_data: Path) -> None:
    bag = open_bag(shared_data / "cases" / "bags" / "first_frame_late_1.5s")
    episode = usable_ticks(bag, load_embodiment(shared_data / "cases" / "small_arm.yaml"))
    assert len(episode.usable) == 97
    assert not episode.dropped


def test_single_messages_that_cannot_be_used_are_counted(write_bag: WriteBag) -> None:
    messages = recording(40)
    messages[5] = (STATES, bag_tools.joint_state(["other"], [1.0], messages[5][2]), messages[5][2])
    raw = bag_tools.STORE.serialize_cdr(messages[20][1], "sensor_msgs/msg/JointState")
    assert messages[20][0] == messages[8][0] == STATES
    messages[20] = (STATES, ("sensor_msgs/msg/JointState", bytes(raw)[:30]), messages[20][2])
    messages.insert(9, (STATES, messages[8][1], messages[8][2]))
    episode = usable_ticks(open_bag(write_bag(messages)), ASOF)
    assert sum(episode.dropped.values()) == 3
    assert episode.dropped["/states: out of order"] == 1
    assert episode.dropped["/states: cannot be deserialized"] == 1
    assert len(episode.usable) > 30


def test_clocks(write_bag: WriteBag) -> None:
    simulated = [
        (topic, message, at)
        for topic, message, at in (
            (topic, picture(at - START) if topic == EYE else recorded_states(at - START), at)
            for topic, _, at in recording(10)
        )
    ]
    path = write_bag(simulated)
    message = fault_of(path)
    assert "they are on different clocks" in message
    assert "set sync.stamp of the topic to receive" in message
    receive = sync("asof", 60.0, "receive")
    assert len(usable_ticks(open_bag(path), robot(receive, receive)).usable) > 5
    for jump, word in ((-2, "backwards by 2.0 s"), (2, "forwards by 2.0 s")):
        jumped = [
            (topic, recorded_states(at - MS + jump * 10**9), at)
            if topic == STATES and at > START + 100 * MS
            else (topic, message, at)
            for topic, message, at in recording(10)
        ]
        message = fault_of(write_bag(jumped))
        assert f"the clock jumped {word}" in message
        assert "/states" in message


def test_ticks_that_are_none_are_refused(write_bag: WriteBag) -> None:
    reader = open_bag(write_bag(recording(20)))
    ticks = usable_ticks(reader, ASOF).usable.tolist()
    assert list(read_frames(reader, ASOF, [], 5)) == []
    with pytest.raises(ValueError, match="is not a control tick"):
        list(read_frames(reader, ASOF, [ticks[3] + 1], 5))
    with pytest.raises(ValueError, match="is not a control tick"):
        list(read_frames(reader, ASOF, [ticks[3], ticks[2]], 5))
    with pytest.raises(ValueError, match="cannot be used: /eye: no message yet"):
        list(read_frames(reader, ASOF, [START + MS], 5))


def test_memory_does_not_grow_with_the_bag(tmp_path: Path) -> None:
    pixels = np.zeros((120, 160, 3), np.uint8)
    peaks = []
    for steps in (100, 400):
        messages = (
            item
            for step in range(steps)
            for item in (
                (STATES, recorded_states(START + step * PERIOD, waist=step), START + step * PERIOD),
                (EYE, bag_tools.image(pixels, "rgb8", stamp_ns=START + step * PERIOD), START + step * PERIOD),
            )
        )
        reader = open_bag(bag_tools.write_bag(tmp_path / str(steps), messages))
        usable = usable_ticks(reader, ASOF).usable.tolist()
        assert len(usable) == steps
        gc.collect()
        tracemalloc.start()
        assert len(usable_ticks(reader, ASOF).usable) == steps
        assert sum(1 for _ in read_frames(reader, ASOF, usable, 10)) == steps
        assert sum(1 for _ in read_episode(reader, ASOF)) == steps
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 60 * pixels.nbytes
    assert peaks[1] < peaks[0] + 5 * pixels.nbytes


def test_the_recorded_demonstration() -> None:
    embodiment = load_embodiment("aloha_bimanual")
    reader = open_bag(resource_path("rosbags/aloha_bimanual"))
    episode = usable_ticks(reader, embodiment)
    assert len(episode.usable) > 400
    assert not episode.dropped
    ticks = episode.usable[:: len(episode.usable) // 6].tolist()
    frames = list(read_frames(reader, embodiment, ticks, 50))
    assert [frame.observation.tick_ns for frame in frames] == ticks
    lower = [0 if joint.unit == "normalised" else joint.lower for joint in embodiment.joints]
    upper = [1 if joint.unit == "normalised" else joint.upper for joint in embodiment.joints]
    for frame in frames:
        assert sorted(frame.observation.images) == sorted(camera.feature for camera in embodiment.cameras.values())
        for image in frame.observation.images.values():
            assert image.ndim == 3
            assert image.shape[1] * 3 == image.shape[0] * 4
            assert image.std() > 5
        assert (frame.actions >= np.array(lower) - 0.02).all()
        assert (frame.actions <= np.array(upper) + 0.02).all()
        assert not frame.action_is_pad[: min(50, int((reader.end_ns - frame.observation.tick_ns) // PERIOD) - 1)].any()


def test_a_robot_that_a_user_describes(shared_data: Path) -> None:
    embodiment = load_embodiment(Path(__file__).parents[1] / "data" / "wx200_pr2.yaml")
    reader = open_bag(shared_data / "bags" / "wx200_pr2_composite")
    episode = usable_ticks(reader, embodiment)
    assert not episode.dropped
    assert set(episode.unusable) <= {"/camera/image_raw: no message yet", "/joint_states: no message yet"}
    assert len(episode.usable) + sum(episode.unusable.values()) == pytest.approx(500, abs=2)
    assert len(episode.usable) > 450
    recorded = list(reader.messages(["/joint_states"]))
    pictures = list(reader.messages(["/camera/image_raw"]))
    frames = list(read_frames(reader, embodiment, episode.usable[::40].tolist(), 10))
    assert len(frames) == len(episode.usable[::40])
    for frame in frames:
        tick = frame.observation.tick_ns
        message = max((m for m in recorded if m.receive_ns <= tick), key=lambda m: m.receive_ns).data
        position = dict(zip(message.name, message.position, strict=True))
        arm = [position[name] for name in ("waist", "shoulder", "elbow", "wrist_angle", "wrist_rotate")]
        finger = (position["left_finger"] - 0.015) / (0.037 - 0.015)
        assert np.allclose(frame.observation.state, [*arm, finger], rtol=1e-5, atol=1e-6)
        image = max((m for m in pictures if m.receive_ns <= tick), key=lambda m: m.receive_ns).data
        cells = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)[:, : image.width]
        rgb = cv2.cvtColor(np.ascontiguousarray(cells), cv2.COLOR_BayerRG2RGB)  # OpenCV's name of ROS's bggr
        assert np.array_equal(frame.observation.images["observation.images.camera"], rgb)


def test_the_tools_describe_the_robot_of_their_document() -> None:
    assert Embodiment.model_validate(document()) == robot()
