# SPDX-License-Identifier: Apache-2.0
"""Which message serves at a control tick, against a search over all messages; clocks; joints by name."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_tools import EYE, JOINTS, MS, START, STATES, document, picture, robot, stamped, states, sync

from clp_ros.core.errors import ClpError
from clp_ros.messages.images import JPEG_FORMAT, decode_image, encode_jpeg
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, ObservationBuffer

PERIOD = 20 * MS
HEADER_POLICIES = [sync(), sync("asof", 35.0), sync("drop")]
POLICIES = HEADER_POLICIES + [rule | {"stamp": "receive"} for rule in HEADER_POLICIES]
PARTS = [JOINTS, ("waist", "elbow"), ("finger",), ("gripper", "finger", "waist"), ("elbow", "waist", "finger")]


@dataclass
class Sent:
    """One message of either topic; ``value`` is in its pixels or in all its positions."""

    topic: str
    stamp: int
    receive: int
    part: tuple[str, ...]
    value: int

    def message(self) -> Any:
        if self.topic == EYE:
            return picture(self.stamp, self.value)
        return states(self.stamp, self.part, [float(self.value)] * len(self.part))


@st.composite
def traffic(draw: st.DrawFn, least_lag_ms: int, parts: list[tuple[str, ...]]) -> list[Sent]:
    """Messages in the order they came in; stamps repeat and come out of order."""
    receive, sent = START, []
    for value in range(draw(st.integers(1, 40))):
        receive += draw(st.sampled_from([0, 1, 3, 10, 20, 33, 100])) * MS
        lag = draw(st.integers(least_lag_ms, 200)) if draw(st.booleans()) else draw(st.sampled_from([0, 20]))
        topic = draw(st.sampled_from([EYE, STATES, STATES]))
        sent.append(Sent(topic, receive - lag * MS, receive, draw(st.sampled_from(parts)), value))
    return sent


def serving(history: list[tuple[int, int]], tick: int) -> tuple[int, int] | None:
    """The newest (stamp, value) not after the tick; of equal stamps, the one that came first."""
    past = [entry for entry in history if entry[0] <= tick]
    newest = max((stamp for stamp, _ in past), default=None)
    return next((entry for entry in past if entry[0] == newest), None)


def fits(rule: dict[str, Any], stamp: int, tick: int) -> bool:
    age = tick - stamp
    if rule["policy"] == "asof":
        return age <= rule["tolerance_ms"] * MS
    return rule["policy"] == "hold" or age < PERIOD


def replay(eye: dict[str, Any], joints: dict[str, Any], sent: list[Sent]) -> Iterator[tuple[int, ObservationBuffer]]:
    """Ticks as a control loop has them; a message that comes in on a tick is there."""
    buffer = ObservationBuffer(robot(eye, joints))
    tick = START
    for item in sent:
        while tick < item.receive:
            yield tick, buffer
            tick += PERIOD
        buffer.add(item.topic, item.message(), item.receive)
    for _ in range(4):
        yield tick, buffer
        tick += PERIOD


def check_against_search(eye: dict[str, Any], joints: dict[str, Any], sent: list[Sent], refuse_late: bool) -> None:
    """Compares every tick's observation with a search over every message received by then."""

    def time_of(item: Sent, rule: dict[str, Any]) -> int:
        return item.stamp if rule["stamp"] == "header" else item.receive

    for tick, buffer in replay(eye, joints, sent):
        cameras: list[tuple[int, int]] = []
        positions: dict[tuple[str, ...], list[tuple[int, int]]] = {}
        for item in (item for item in sent if item.receive <= tick):
            entry = (time_of(item, eye if item.topic == EYE else joints), item.value)
            names = tuple(sorted(set(item.part) & set(JOINTS)))
            history = cameras if item.topic == EYE else positions.setdefault(names, [])
            if not refuse_late or not history or entry[0] > max(history)[0]:
                history.append(entry)
        frame = serving(cameras, tick)
        joint_entries = {
            joint: max(
                (
                    entry
                    for part, history in positions.items()
                    if joint in part and (entry := serving(history, tick)) is not None
                ),
                default=None,
            )
            for joint in ("finger", "waist", "elbow")
        }
        found = None not in (frame, *joint_entries.values())
        oldest = min(entry[0] for entry in joint_entries.values()) if found else 0
        if not found or not fits(eye, frame[0], tick) or not fits(joints, oldest, tick):
            with pytest.raises(NotReadyError):
                buffer.observe(tick)
            continue
        observation = buffer.observe(tick)
        assert observation.tick_ns == tick
        assert observation.stamps == {EYE: frame[0], STATES: oldest}
        assert observation.images["observation.images.eye"][0, 0, 0] == frame[1]
        assert observation.state.dtype == np.float32
        finger, waist, elbow = (joint_entries[name] for name in ("finger", "waist", "elbow"))
        assert observation.state[0] == pytest.approx((finger[1] - 0.02) / (0.06 - 0.02), rel=1e-5)
        assert observation.state[1:].tolist() == [waist[1], elbow[1]]


def unambiguous(sent: list[Sent]) -> list[Sent]:
    """Without JointStates of different parts that have one stamp: which of them is the newest cannot be told."""
    seen: dict[tuple[str, int], set[str]] = {}
    kept = []
    for item in sent:
        others = seen.setdefault((item.topic, item.stamp), set(item.part))
        if item.topic == EYE or others == set(item.part):
            kept.append(item)
    return kept


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HEADER_POLICIES), st.sampled_from(HEADER_POLICIES), traffic(0, [JOINTS, JOINTS[::-1]]))
def test_no_message_that_serves_is_missed(eye: dict[str, Any], joints: dict[str, Any], sent: list[Sent]) -> None:
    # Whatever comes late, twice or out of order: the answer is that of a search over all messages.
    check_against_search(eye, joints, sent, refuse_late=False)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(POLICIES), st.sampled_from(POLICIES), traffic(-150, PARTS).map(unambiguous))
def test_stamps_ahead_of_the_clock_and_joint_states_in_parts(
    eye: dict[str, Any], joints: dict[str, Any], sent: list[Sent]
) -> None:
    if "receive" in (eye["stamp"], joints["stamp"]):
        # Of messages received at one time, the first of each part serves; parts of equal time are ambiguous again.
        sent = [Sent(i.topic, i.stamp + n, i.receive + n, i.part, i.value) for n, i in enumerate(sent)]
    check_against_search(eye, joints, sent, refuse_late=True)


@pytest.mark.parametrize("rate_hz", [10, 50, 500])
@pytest.mark.parametrize("ahead_ms", [0, 5, 100, 900])
def test_a_clock_ahead_is_tolerated_at_any_rate(rate_hz: int, ahead_ms: int) -> None:
    buffer = ObservationBuffer(robot())
    step = 10**9 // rate_hz
    for count in range(3 * rate_hz):
        receive = START + count * step
        stamp = receive + ahead_ms * MS
        buffer.add(STATES, states(stamp), receive)
        buffer.add(EYE, picture(stamp), receive)
        assert len(buffer._sources[EYE]._kept) <= 5 + rate_hz
    assert 0 <= receive - buffer.observe(receive).stamps[EYE] < step
    assert 0 <= receive - buffer.observe(receive).stamps[STATES] < step


def test_memory_is_that_of_a_few_messages() -> None:
    buffer = ObservationBuffer(robot())
    rng = np.random.default_rng(0)
    for count in range(2000):
        now = START + count * MS
        names = tuple(rng.permutation([f"joint_{rng.integers(10**6)}", *JOINTS]).tolist())
        buffer.add(STATES, states(now, names), now)
        buffer.add(EYE, picture(now), now)
    (part,) = buffer._sources[STATES]._parts.values()
    assert len(part._kept) <= 5
    assert len(buffer._sources[EYE]._kept) <= 5
    assert len(buffer._selectors[STATES]._orders) <= 64


def ready(buffer: ObservationBuffer, now: int) -> bool:
    buffer.add(STATES, states(now), now)
    buffer.add(EYE, picture(now), now)
    return buffer.observe(now).stamps == {STATES: now, EYE: now}


@pytest.mark.parametrize(
    ("jump_s", "message"),
    [
        (-1.1, "the clock jumped backwards by 1.1 s"),
        (-3600, "the clock jumped backwards by 3600.0 s"),
        (1.1, "the clock jumped forwards by 1.1 s"),
        (59, "the clock jumped forwards by 59.0 s"),
        (10**6, "the clock jumped forwards"),
    ],
)
@pytest.mark.parametrize("topic", [EYE, STATES])
def test_a_header_clock_that_jumps(jump_s: float, message: str, topic: str) -> None:
    buffer = ObservationBuffer(robot())
    assert ready(buffer, START)
    now = START + 30 * MS
    jumped = now - 30 * MS + round(jump_s * 1e9)
    with pytest.raises(ClpError, match=message) as fault:
        buffer.add(topic, picture(jumped) if topic == EYE else states(jumped), START)
    assert fault.value.where == topic
    assert fault.value.hint
    with pytest.raises(NotReadyError, match=f"{topic}: no message yet"):
        buffer.observe(now)
    assert ready(buffer, now)


def test_a_receive_clock_that_jumps_back() -> None:
    rule = sync(stamp="receive")
    buffer = ObservationBuffer(robot(rule, rule))
    assert ready(buffer, START)
    with pytest.raises(ClpError, match="the clock jumped backwards by 5"):
        buffer.add(EYE, picture(0), START - 5 * 10**9)
    buffer.add(STATES, states(0), START + MS)
    buffer.add(EYE, picture(0), START + MS)
    assert buffer.observe(START + MS).stamps == {EYE: START + MS, STATES: START + MS}


def test_a_stalled_network_is_no_clock_jump() -> None:
    # Three seconds of nothing; then what had queued comes at once, then all is as before.
    buffer = ObservationBuffer(robot(sync("asof", 100.0), sync("asof", 100.0)))
    assert ready(buffer, START)
    now = START + 3 * 10**9
    for stamp in range(START + 20 * MS, now - 500 * MS, 20 * MS):
        assert buffer.add(STATES, states(stamp), now)
        assert buffer.add(EYE, picture(stamp), now)
    with pytest.raises(NotReadyError, match="ms old, tolerance 100 ms"):
        buffer.observe(now)
    assert ready(buffer, now + 20 * MS)
    assert not buffer.dropped


@pytest.mark.parametrize("stamp", [0, 5 * 10**9, START - 25 * 3600 * 10**9, START + 2 * 10**9])
def test_stamps_of_another_clock(stamp: int) -> None:
    # As a simulation's, that begin at zero while the bag has wall time.
    buffer = ObservationBuffer(robot())
    for count in range(3):
        with pytest.raises(
            ClpError, match=r"/eye: .* they are on different clocks \(hint: set sync\.stamp of the topic to receive"
        ):
            buffer.add(EYE, picture(stamp + count * MS), START + count * MS)
    receive = ObservationBuffer(robot(sync(stamp="receive")))
    assert receive.add(EYE, picture(stamp), START)


def test_a_clock_that_stays_a_minute_behind_is_another_clock() -> None:
    buffer = ObservationBuffer(robot())
    taken = []
    for step in range(30):
        now = START + step * 100 * MS
        taken.append(False)
        with suppress(ClpError):
            taken[-1] = buffer.add(EYE, picture(now - 61 * 10**9), now)
    # A single message may be that old, and some that were kept may be; not all, while time passes.
    assert taken[0]
    assert not any(taken[6:])
    assert buffer.refused == {EYE: "header stamps are 61.0 s behind the receive stamps: they are on different clocks"}


def clocked(publishers: dict[tuple[str, ...], int], seconds: float = 2.0, rate_hz: int = 50) -> ObservationBuffer:
    """A topic with publishers of their own joints, whose clocks are off by so many nanoseconds; none is in step."""
    buffer = ObservationBuffer(robot(sync("asof", 100.0), sync("asof", 50.0)))
    for step in range(round(seconds * rate_hz)):
        now = START + step * 10**9 // rate_hz
        for number, (names, offset) in enumerate(publishers.items()):
            with suppress(ClpError):
                buffer.add(STATES, states(now + offset, names), now + number * MS)
        buffer.add(EYE, picture(now), now)
    return buffer


LAST = START + 1980 * MS + 2 * MS
ARM, FINGER, WHEELS = ("waist", "elbow"), ("finger",), ("front_left_wheel", "front_right_wheel")


@pytest.mark.parametrize("offset", [-START, -3600 * 10**9, -1200 * MS, 0, 1200 * MS, 3600 * 10**9])
def test_joint_states_of_other_joints_do_not_touch_the_clock(offset: int) -> None:
    # A mobile base's wheels: they may have no stamp, another clock, or the same.
    for names in (WHEELS, ()):
        buffer = clocked({names: offset, JOINTS: 0})
        assert np.allclose(buffer.state(LAST), [0.5, 1.0, 2.0], rtol=1e-6)
        assert not buffer.refused


@pytest.mark.parametrize("late_ms", [1200, 300])
def test_a_host_whose_clock_is_behind_is_named_as_that(late_ms: int) -> None:
    lag = rf"its stamps are always {late_ms // 10}\d ms behind the receive stamps"
    words = rf"{late_ms // 100}\d\d ms old, tolerance 50 ms: {lag}, as those of a host whose clock is off"
    for names, others, whose in ((FINGER, ARM, "joint 'finger' is "), (JOINTS, (), "")):
        buffer = clocked({names: -late_ms * MS, others: 0})
        with pytest.raises(NotReadyError, match=f"/states: {whose}{words}"):
            buffer.state(LAST)


@pytest.mark.parametrize("offset_s", [1.2, 30.0])
def test_a_host_that_is_ahead_is_refused_and_the_others_are_not(offset_s: float) -> None:
    buffer = clocked({FINGER: round(offset_s * 1e9), ARM: 0})
    words = f"header stamps of joint 'finger' are {offset_s:.1f} s ahead of the receive stamps: they are on different"
    # What the arm's messages say does not hide it.
    assert buffer.refused[STATES].startswith(words)
    with pytest.raises(NotReadyError, match="no message yet with joint 'finger'"):
        buffer.state(LAST)
    assert buffer.add(STATES, states(LAST, FINGER), LAST)
    assert np.allclose(buffer.state(LAST), [0.5, 1.0, 2.0], rtol=1e-6)
    assert not buffer.refused


@pytest.mark.parametrize("late_s", [1.1, 1.5, 10.0, 55.0, 600.0])
@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("apart_ms", [0, 2])
def test_messages_that_were_kept_and_come_late_at_first_are_no_jump(late_s: float, count: int, apart_ms: int) -> None:
    # What a publisher latched, and what queued while its subscription was discovered: at once, or one after another.
    buffer = ObservationBuffer(robot(sync("asof", 100.0)))
    buffer.add(STATES, states(START), START)
    for number in range(count):
        now = START + number * apart_ms * MS
        assert buffer.add(EYE, picture(START - round(late_s * 1e9) + number * 33 * MS), now)
        with pytest.raises(NotReadyError, match=r"/eye: \d+ ms old, tolerance 100 ms$"):
            buffer.observe(now)
    for _ in range(40):
        now += 33 * MS
        assert buffer.add(EYE, picture(now - 5 * MS), now)
    assert buffer.observe(now).stamps[EYE] == now - 5 * MS


def test_a_latched_gripper_on_the_arms_topic_is_old_and_nothing_else() -> None:
    buffer = ObservationBuffer(robot(states=sync("asof", 50.0)))
    held = ObservationBuffer(robot())
    for step in range(200):
        now = START + step * 20 * MS
        for one in (buffer, held):
            assert one.add(STATES, states(now, ARM), now)
            if step in (5, 150):  # as it was ten seconds before, and when the gripper has moved
                assert one.add(STATES, states(now - (10**10 if step == 5 else 0), FINGER), now + MS)
        if step >= 5:
            assert np.allclose(held.state(now + MS), [0.5, 1.0, 2.0], rtol=1e-6)
        if 5 <= step < 150:
            with pytest.raises(NotReadyError, match=r"joint 'finger' is \d+ ms old, tolerance 50 ms$"):
                buffer.state(now)
    assert not buffer.dropped


@pytest.mark.parametrize("jump_s", [-1.1, -30.0, 1.1, 30.0])
@pytest.mark.parametrize("lag_s", [0.0, 5.0])
def test_a_clock_that_jumps_later_is_seen_whatever_its_first_messages_and_its_lag_were(
    jump_s: float, lag_s: float
) -> None:
    buffer = ObservationBuffer(robot())
    assert buffer.add(STATES, states(START - 20 * 10**9, FINGER), START)
    for step in range(60):
        now = START + step * 20 * MS
        assert buffer.add(STATES, states(now - round(lag_s * 1e9), FINGER), now)
        assert buffer.add(STATES, states(now, ARM), now)
    direction = "forwards" if jump_s > 0 else "backwards"
    with pytest.raises(ClpError, match=f"the clock of joint 'finger' jumped {direction} by {abs(jump_s):.1f} s"):
        buffer.add(STATES, states(now + 20 * MS + round((jump_s - lag_s) * 1e9), FINGER), now + 20 * MS)
    assert buffer.add(STATES, states(now + 20 * MS, ARM), now + 20 * MS)


def test_messages_without_a_header() -> None:
    bare = SimpleNamespace(name=list(JOINTS), position=[1.0, 2.0, 0.04])
    with pytest.raises(
        ClpError, match=r"/states: messages have no header \(hint: set sync\.stamp of the topic to receive"
    ):
        ObservationBuffer(robot()).add(STATES, bare, START)
    assert ObservationBuffer(robot(states=sync(stamp="receive"))).add(STATES, bare, START)


def test_joints_by_name_in_the_embodiments_order_and_units() -> None:
    buffer = ObservationBuffer(robot())
    for count, names in enumerate([JOINTS, JOINTS[::-1], ("other", "elbow", "x", "finger", "waist")]):
        now = START + count * 20 * MS
        assert buffer.add(STATES, states(now, names), now)
        assert np.allclose(buffer.state(now), [0.5, 1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (lambda at: states(at, JOINTS, [1.0, np.nan, 0.03]), "the position of joint 'elbow' is not finite"),
        (lambda at: states(at, JOINTS, [np.inf, 1.0, 0.03]), "the position of joint 'waist' is not finite"),
        (lambda at: states(at, JOINTS, [1.0, 2.0]), "the JointState has 3 names but 2 positions"),
        (lambda at: states(at, JOINTS, []), "the JointState has 3 names but 0 positions"),
        (lambda at: states(at, (*JOINTS, "waist"), [1.0] * 4), "joint 'waist' is in the JointState twice"),
        (lambda at: states(at - 40 * MS), "out of order"),
        (lambda at: states(at - 20 * MS), "out of order"),
    ],
)
def test_single_bad_joint_states_are_counted_drops(message: Any, reason: str) -> None:
    buffer = ObservationBuffer(robot())
    assert ready(buffer, START)
    now = START + 20 * MS
    assert not buffer.add(STATES, message(now), now)
    ((key, count),) = buffer.dropped.items()
    assert key[0] == STATES
    assert key[1].startswith(reason)
    assert buffer.refused == {STATES: key[1]}
    assert count == 1
    assert np.allclose(buffer.state(now), [0.5, 1.0, 2.0], rtol=1e-6)  # what was known before
    assert ready(buffer, now + 20 * MS)
    assert buffer.refused == {}


@pytest.mark.parametrize(("names", "has"), [(("other",), "other"), ((), "no names")])
def test_joint_states_of_other_joints_are_counted_and_named_where_there_are_no_others(
    names: tuple[str, ...], has: str
) -> None:
    buffer = ObservationBuffer(robot())
    for step in range(2):
        assert not buffer.add(STATES, states(START, names), START)
        ((topic, reason),) = buffer.dropped
        assert (topic, buffer.dropped[topic, reason]) == (STATES, 1 + step)
        assert reason == f"joint 'finger' is not in the JointState, which has {has}"
        assert buffer.refused == {STATES: reason}
        assert buffer.faulty(STATES) == 1 + step
    # Where the robot's come too they are no fault.
    assert ready(buffer, START)
    assert not buffer.add(STATES, states(START + MS, names), START + MS)
    assert (buffer.dropped[STATES, reason], buffer.faulty(STATES), buffer.refused) == (3, 0, {})


def test_values_of_joints_that_are_not_wanted_do_not_matter() -> None:
    buffer = ObservationBuffer(robot())
    assert buffer.add(STATES, states(START, (*JOINTS, "x", "x"), [1.0, 2.0, 0.04, np.nan, np.inf]), START)
    assert np.allclose(buffer.state(START), [0.5, 1.0, 2.0], rtol=1e-6)


def test_an_arm_and_its_gripper_that_publish_on_one_topic() -> None:
    buffer = ObservationBuffer(robot(states=sync("asof", 50.0)))
    buffer.add(STATES, states(START, ("waist", "elbow"), [1.0, 2.0]), START)
    with pytest.raises(NotReadyError, match=r"joint 'finger' is in no JointState \(they have waist, elbow\)"):
        buffer.state(START)
    # The gripper's stamp is before the arm's and it comes in after it: still news.
    assert buffer.add(STATES, states(START - 10 * MS, ("finger",), [0.06]), START + MS)
    assert np.allclose(buffer.state(START + MS), [1.0, 1.0, 2.0])
    # The arm goes on, the gripper has stopped: the state is as old as its oldest joint.
    for step in range(1, 10):
        now = START + step * 20 * MS
        assert buffer.add(STATES, states(now, ("waist", "elbow"), [1.0 + step, 2.0]), now)
        if now - (START - 10 * MS) <= 50 * MS:
            assert np.allclose(buffer.state(now), [1.0, 1.0 + step, 2.0])
        else:
            with pytest.raises(NotReadyError, match=r"joint 'finger' is \d+ ms old, tolerance 50 ms"):
                buffer.state(now)
    assert buffer.newest(STATES) == START - 10 * MS
    assert not buffer.dropped


def test_a_joint_that_never_comes_is_named() -> None:
    buffer = ObservationBuffer(robot())
    for step in range(3):
        buffer.add(STATES, states(START + step * MS, ("waist", "elbwo", "finger"), [1.0] * 3), START + step * MS)
    with pytest.raises(
        NotReadyError, match=r"/states: joint 'elbow' is in no JointState \(they have waist, elbwo, finger\)"
    ):
        buffer.state(START + 10 * MS)
    assert buffer.newest(STATES) is None


def test_images_are_decoded_when_they_are_asked_for_only() -> None:
    buffer = ObservationBuffer(robot())
    buffer.add(STATES, states(START), START)
    broken = picture(START)
    broken.encoding = "32FC1"
    assert buffer.add(EYE, broken, START)
    selected = buffer.select(START)
    with pytest.raises(ClpError, match=r"/eye: .*'32FC1' cannot be read"):
        buffer.decode(START, selected)
    assert ready(buffer, START + MS)


def jpeg(stamp: int, grey: int) -> SimpleNamespace:
    """A CompressedImage of one shade."""
    data = encode_jpeg(np.full((32, 48, 3), grey, np.uint8))
    return stamped(stamp, format=JPEG_FORMAT, data=data)


def test_what_was_begun_ahead_is_decoded_once_and_only_what_is_asked_for_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[int] = []

    def counting(message: Any, topic: str) -> np.ndarray:
        decoded.append(id(message))
        return decode_image(message, topic)

    monkeypatch.setattr("clp_ros.robots.observation.decode_image", counting)
    compressed = document()
    compressed["cameras"]["eye"]["type"] = "sensor_msgs/msg/CompressedImage"
    buffer, key = ObservationBuffer(Embodiment.model_validate(compressed)), "observation.images.eye"
    buffer.add(STATES, states(START), START)
    first, broken, last = jpeg(START, 40), jpeg(START + MS, 90), jpeg(START + 2 * MS, 140)
    broken.data = broken.data[:-10]

    for message in (first, first):
        buffer.decode_ahead({EYE: message})
    buffer.add(EYE, first, START)
    selected = buffer.select(START)
    shown = buffer.decode(START, selected).images[key]
    assert decoded == [id(first)]
    assert np.array_equal(shown, decode_image(first))
    # Whoever has the picture may write in it: the next one is another.
    shown[:] = 0
    assert np.array_equal(buffer.decode(START, selected).images[key], decode_image(first))

    buffer.decode_ahead({EYE: broken})
    buffer.add(EYE, last, START + 2 * MS)
    shown = buffer.observe(START + 2 * MS).images[key]
    assert np.array_equal(shown, decode_image(last))

    buffer.decode_ahead({EYE: broken})
    with pytest.raises(ClpError, match=r"/eye: the JPEG data of .* cut off"):
        buffer.decode(START + 2 * MS, selected | {EYE: (START + MS, broken)})
    assert np.array_equal(buffer.observe(START + 2 * MS).images[key], decode_image(last))


def test_reasons() -> None:
    buffer = ObservationBuffer(robot(sync("asof", 100.0), sync("drop")))
    with pytest.raises(NotReadyError) as missing:
        buffer.observe(START)
    assert (missing.value.topic, missing.value.reason) == (EYE, "no message yet")
    buffer.add(EYE, picture(START + 500 * MS), START)
    with pytest.raises(NotReadyError, match="its stamps are 500 ms in the future"):
        buffer.observe(START)
    with pytest.raises(NotReadyError, match="/states: no message yet"):
        buffer.observe(START + 500 * MS)
    buffer.add(STATES, states(START + 500 * MS), START + 500 * MS)
    assert buffer.observe(START + 500 * MS).tick_ns == START + 500 * MS
    with pytest.raises(NotReadyError, match="/states: nothing new for 20 ms"):
        buffer.observe(START + 520 * MS)
    with pytest.raises(NotReadyError, match="/eye: 101 ms old, tolerance 100 ms"):
        buffer.observe(START + 601 * MS)
    buffer.forget(EYE)
    with pytest.raises(NotReadyError, match="/eye: no message yet"):
        buffer.observe(START + 500 * MS)
    assert buffer.newest(STATES) == START + 500 * MS
    buffer.forget()
    assert buffer.newest(STATES) is None
