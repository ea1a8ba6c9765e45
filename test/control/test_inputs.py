# SPDX-License-Identifier: Apache-2.0
"""When a live robot's frames serve: cameras of their own phases, whose frames take their time to come in."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from clp_ros.control.inputs import IncompleteError, LiveInputs
from clp_ros.robots.embodiment import Embodiment, load_embodiment

MS = 10**6
PERIOD_NS = 33_333_333
START_NS = 1_000 * 10**9


@pytest.fixture(scope="module")
def embodiment() -> Embodiment:
    return load_embodiment("aloha_bimanual")


def message(stamp: int, **content: object) -> SimpleNamespace:
    header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp // 10**9, nanosec=stamp % 10**9))
    return SimpleNamespace(header=header, **content)


def played(embodiment: Embodiment, phases_ns: list[int], lag_ns: int, seconds: float = 3.0) -> tuple[list[int], int]:
    """The ages (ns) of the frames that are taken as soon as they serve, and how often an input was said to be missing.

    After the first half second: a camera's period is known then.
    """
    inputs, cameras = LiveInputs(embodiment), [camera.topic for camera in embodiment.cameras.values()]
    names = [joint.name for joint in embodiment.joints[:7]]
    events = [  # (when it comes in, topic, stamp)
        (stamp + lag_ns, topic, stamp)
        for topic, phase in zip(cameras, phases_ns, strict=True)
        for stamp in range(START_NS + phase, START_NS + round(seconds * 1e9), PERIOD_NS)
    ]
    events += [
        (stamp, states.topic, stamp)
        for states in embodiment.joint_states.values()
        for stamp in range(START_NS, START_NS + round(seconds * 1e9) + lag_ns, 10 * MS)
    ]
    seen: dict[str, int | None] = dict.fromkeys(cameras)
    ages, missing = [], 0
    for now, topic, stamp in sorted(events):
        is_camera = topic in cameras
        inputs.add(topic, message(stamp) if is_camera else message(stamp, name=names, position=[0.0] * 7), now)
        if now < START_NS + 500 * MS:
            continue
        missing += bool(inputs.missing(now))
        if is_camera:
            try:
                selected = inputs.take(now, seen)
            except IncompleteError:
                continue
            seen = {topic: selected[topic][0] for topic in cameras}
            ages += [now - stamp for stamp in seen.values()]
    return ages, missing


@pytest.mark.parametrize("lag_ms", [0, 2, 8, 12, 20, 33, 40, 60])
def test_a_set_of_frames_comes_every_period_whatever_the_phases_and_the_lag(
    embodiment: Embodiment, lag_ms: int
) -> None:
    rng = np.random.default_rng(lag_ms)
    for _ in range(20):
        ages, missing = played(embodiment, rng.integers(0, PERIOD_NS, 3).tolist(), lag_ms * MS)
        assert len(ages) / 3 >= 2.4 * 30 / 2  # of 2.5 s, at the least every second frame
        # Not one that is about to be followed by the next, where there is always a moment to wait for.
        assert max(ages) <= (PERIOD_NS if 4 * lag_ms * MS <= PERIOD_NS else PERIOD_NS + lag_ms * MS)
        assert missing == 0


def test_a_camera_that_has_stopped_is_missing_after_a_period_whatever_its_lag(embodiment: Embodiment) -> None:
    for lag in (0, 40 * MS):
        inputs = LiveInputs(embodiment)
        (topic, *_) = (camera.topic for camera in embodiment.cameras.values())
        for number in range(10):
            stamp = START_NS + number * PERIOD_NS
            inputs.add(topic, message(stamp), stamp + lag)
        last = stamp + lag
        assert topic not in [one.topic for one in inputs.missing(last + PERIOD_NS - MS)]
        assert topic in [one.topic for one in inputs.missing(last + PERIOD_NS + MS)]


@pytest.mark.parametrize("ahead_ms", [200, 900])
def test_one_publisher_whose_clock_is_ahead_is_missing_though_the_other_is_not(
    embodiment: Embodiment, ahead_ms: int
) -> None:
    # Its newest message of the past would be that old in truth.
    inputs, (states, _) = LiveInputs(embodiment), embodiment.joint_states.values()
    names = [joint.name for joint in embodiment.joints[:7]]
    for step in range(100):
        now = START_NS + step * 20 * MS
        inputs.add(states.topic, message(now, name=names[:6], position=[0.0] * 6), now)
        inputs.add(states.topic, message(now + ahead_ms * MS, name=names[6:], position=[0.03]), now)
    (missing,) = [one for one in inputs.missing(now) if one.topic == states.topic]
    assert missing.reason.startswith(f"its stamps are {ahead_ms} ms in the future")


def test_frames_that_are_there_are_decoded_while_the_last_is_waited_for(
    embodiment: Embodiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    done = threading.Event()

    def decode(message: SimpleNamespace, topic: str) -> np.ndarray:
        begun.append(message.number)
        done.set()
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr("clp_ros.robots.observation.decode_image", decode)
    inputs, cameras = LiveInputs(embodiment), [camera.topic for camera in embodiment.cameras.values()]
    for number in range(10):
        now = START_NS + number * PERIOD_NS
        for topic in cameras:
            inputs.add(topic, message(now, number=number), now)
    seen = inputs.newest_frames()
    inputs.decode_ahead(now, seen)
    now += PERIOD_NS
    inputs.add(cameras[0], message(now, number=10), now)
    inputs.decode_ahead(now, seen)
    assert done.wait(10)
    # None that has been used, and none that is too old to be.
    inputs.decode_ahead(now + 2 * PERIOD_NS, dict.fromkeys(cameras))
    for topic in cameras[1:]:
        inputs.add(topic, message(now, number=11), now)
    for states in embodiment.joint_states.values():
        names = [joint.name for joint in embodiment.joints[:7]]
        inputs.add(states.topic, message(now, name=names, position=[0.0] * 7), now)
    inputs.decode(now, inputs.take(now, seen))
    assert sorted(begun) == [10, 11, 11]
