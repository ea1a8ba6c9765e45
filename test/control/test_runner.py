# SPDX-License-Identifier: Apache-2.0
"""The loop without ROS: a clock that tests set, messages that tests add. What it does on a robot is in test_policy."""

import dataclasses
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

from clp_ros.control.chunk_schedule import ScheduleSettings
from clp_ros.control.inputs import IncompleteError, LiveInputs
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.replan import ReplanConfig
from clp_ros.control.run_log import RunLog
from clp_ros.control.runner import ChunkRunner
from clp_ros.control.statistics import WINDOW, Statistics
from clp_ros.control.watchdog import WatchdogConfig
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.trajectory import Trajectory

MS = 10**6
PERIOD_NS = 33 * MS
START_NS = 1_000 * 10**9


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Rig:
    """A runner on a robot whose time passes when a test says so."""

    def __init__(
        self,
        embodiment: Embodiment,
        replan: ReplanConfig,
        predict: Callable[..., np.ndarray] | None = None,
        log: RunLog | None = None,
        schedule: ScheduleSettings | None = None,
        processor: ProcessorShare | None = None,
    ) -> None:
        self.now = START_NS
        self.cameras = [camera.topic for camera in embodiment.cameras.values()]
        self.joints = [states.topic for states in embodiment.joint_states.values()]
        self.names = [joint.name for joint in embodiment.joints[:7]]
        self.inputs = LiveInputs(embodiment)
        self.sent: list[list[Trajectory]] = []
        self.notified: list[tuple[int, str]] = []
        self.tasks: list[str] = []
        self.failures: list[str] = []
        self.continuing: list[dict[str, int]] = []
        self.predict = predict or (lambda images, state, task: np.tile(state, (50, 1)))
        self.runner = ChunkRunner(
            embodiment,
            self.inputs,
            SimpleNamespace(predict_chunk=self._predict),
            "do it",
            replan,
            self.sent.append,
            clock_ns=lambda: self.now,
            notify=lambda level, text: self.notified.append((level, text)),
            watchdog=WatchdogConfig(input_timeout_s=0.5, policy_timeout_s=1.0, max_faults=5),
            failed=self.failures.append,
            log=log,
            schedule=schedule,
            processor=processor,
        )

    def _predict(self, images: dict[str, np.ndarray], state: np.ndarray, task: str, **continuing: int) -> np.ndarray:
        self.tasks.append(task)
        self.continuing.append(continuing)
        return self.predict(images, state, task)

    def add(self, *topics: str, age_ns: int = 0, position: float = 0.03) -> None:
        for topic in topics:
            stamp = self.now - age_ns
            header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp // 10**9, nanosec=stamp % 10**9))
            if topic in self.joints:
                positions = [0.0] * 6 + [position]
                message = SimpleNamespace(header=header, name=self.names, position=positions)
            else:
                message = SimpleNamespace(header=header, format="jpeg", data=JPEG)
            self.inputs.add(topic, message, self.now)

    def frames(self, number: int = 1) -> None:
        """All inputs, so many periods on end."""
        for _ in range(number):
            self.now += PERIOD_NS
            self.add(*self.joints, *self.cameras)

    def due_frames(self) -> None:
        """All inputs, once the robot follows the last chunk: then the next one may be made."""
        self.now += 200 * MS
        self.frames()

    def started(self) -> "Rig":
        self.frames(2)
        self.runner.activate()
        return self

    def quiet(self) -> None:
        """Nothing is sent, though the worker looks many times."""
        before = len(self.sent)
        time.sleep(0.25)
        assert len(self.sent) == before


JPEG = cv2.imencode(".jpg", np.full((8, 8, 3), 128, np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def embodiment() -> Embodiment:
    return load_embodiment("aloha_bimanual")


@pytest.fixture
def make(embodiment: Embodiment) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(predict: Callable[..., np.ndarray] | None = None, **pace: Any) -> Rig:
        rigs.append(Rig(embodiment, ReplanConfig(**{"replan_steps": 0} | pace), predict))
        return rigs[-1].started()

    yield make
    for rig in rigs:
        assert rig.runner.close(20)
    assert "policy" not in [thread.name for thread in threading.enumerate()]


def test_a_chunk_is_made_of_a_set_of_frames_that_is_new_in_every_camera(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.quiet()  # the frames from before the activation are not used
    rig.now += PERIOD_NS
    rig.add(*rig.joints, *rig.cameras[:2])
    rig.quiet()
    rig.add(rig.cameras[2])
    until(lambda: len(rig.sent) == 1)
    assert [trajectory.controller for trajectory in rig.sent[0]] == [
        "left_arm",
        "left_gripper",
        "right_arm",
        "right_gripper",
    ]
    np.testing.assert_allclose(rig.sent[0][1].positions, 0.03, atol=1e-8)
    # The 50 steps, but for the first 200 ms on the way from the controllers' last command.
    np.testing.assert_allclose(rig.sent[0][0].times, np.arange(11, 51) / 50)
    assert rig.sent[0][0].start_ns == rig.now
    np.testing.assert_allclose(rig.sent[0][0].velocities, 0.0, atol=1e-6)
    rig.quiet()


def test_a_policy_that_waits_for_the_processor_is_reported_once(embodiment: Embodiment) -> None:
    reported: list[str] = []
    wall = itertools.count(0, 2).__next__  # each chunk takes 2 s, in which its thread does not run
    rig = Rig(embodiment, ReplanConfig(0), processor=ProcessorShare(reported.append, wall, lambda: 0.0)).started()
    try:
        for number in range(1, 6):
            rig.due_frames()
            until(lambda number=number: len(rig.sent) == number)
            assert len(reported) == (number >= 3)
    finally:
        assert rig.runner.close(20)


def test_a_frame_older_than_its_cameras_period_waits_for_the_next(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.now += PERIOD_NS
    rig.add(*rig.joints, rig.cameras[0])
    rig.now += PERIOD_NS + MS
    rig.add(*rig.joints, *rig.cameras[1:])  # the first camera's next frame is late
    rig.quiet()
    rig.add(rig.cameras[0])
    until(lambda: rig.sent)
    ages = {name: its.maximum for name, its in rig.runner.statistics.spreads().items() if name.startswith("age")}
    assert set(ages.values()) == {0.0}
    assert len(ages) == 5


@pytest.mark.parametrize(
    ("mode", "takes_ms", "waits"), [("replace", 150, True), ("replace", 60, False), ("ensemble", 150, False)]
)
def test_the_newest_chunk_alone_counts_so_with_a_slow_policy_the_next_is_made_when_it_is_in_effect(
    embodiment: Embodiment, mode: str, takes_ms: int, waits: bool
) -> None:
    def slow(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        rig.now += takes_ms * MS
        rig.add(*rig.joints)
        return moving(images, state, task)

    rig = Rig(embodiment, ReplanConfig(0), slow, schedule=ScheduleSettings(mode=mode)).started()
    try:
        rig.frames()
        until(lambda: len(rig.sent) == 1)
        rig.frames(2)  # it is 20 ms to the splice, and 100 ms more until the robot follows the chunk
        if waits:
            time.sleep(0.2)
            assert len(rig.sent) == 1
        else:
            until(lambda: len(rig.sent) > 1)
        number = len(rig.sent)
        rig.due_frames()
        until(lambda: len(rig.sent) > number)
    finally:
        assert rig.runner.close(20)


def test_the_next_chunk_comes_replan_steps_later_of_frames_from_then_on(make: Callable[..., Rig]) -> None:
    rig = make(replan_steps=10)  # 200 ms
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    for _ in range(6):
        rig.frames()
        rig.quiet()  # 33 to 198 ms later
    rig.frames()
    until(lambda: len(rig.sent) == 2)


def test_the_rate_is_bounded(make: Callable[..., Rig]) -> None:
    rig = make(rate_hz=10.0)
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    for _ in range(3):
        rig.frames()
        rig.quiet()
    rig.frames()
    until(lambda: len(rig.sent) == 2)


@pytest.mark.parametrize(
    ("chunk", "counter", "words"),
    [
        (KeyError("x"), "policy errors", "KeyError: 'x'"),
        (MemoryError("full"), "policy errors", "MemoryError: full"),
        (SystemExit("a library gives up"), "policy errors", "SystemExit: a library gives up"),
        (ClpError("no image"), "refused", "no image"),
        (np.full((5, 14), np.inf), "refused", "not finite at step 0, joint 'waist'"),
        (np.zeros((5, 13)), "refused", "shape (5, 13)"),
        (np.zeros((0, 14)), "refused", "shape (0, 14)"),
        (None, "refused", "shape ()"),
    ],
)
def test_whatever_the_policy_does_the_loop_goes_on(
    make: Callable[..., Rig], chunk: Any, counter: str, words: str
) -> None:
    def fail(*_: Any) -> Any:
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    rig = make(fail)
    for times in (1, 2, 3):
        rig.frames()
        until(lambda times=times: rig.runner.statistics.counts()[counter] == times)
    rig.quiet()
    assert rig.runner.statistics.counts()[counter] == 3  # once a set of frames, not in circles
    assert words in rig.runner.fault_reason
    assert [level for level, _ in rig.notified] == [logging.WARNING]  # said once
    assert words in rig.notified[0][1]
    rig.predict = lambda images, state, task: np.tile(state, (50, 1))
    rig.frames()
    until(lambda: rig.sent)
    assert rig.runner.fault_reason is None
    until(lambda: rig.notified[1:] == [(logging.INFO, "sending again")])


@pytest.mark.parametrize(("step_ns", "sent"), [(1000 * MS, 1), (1001 * MS, 0), (-1 * MS, 0)])
def test_a_chunk_whose_observation_is_too_old_or_of_another_clock_is_dropped(
    make: Callable[..., Rig], step_ns: int, sent: int
) -> None:
    def slow(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        rig.now += step_ns
        if step_ns > 0:
            rig.add(*rig.joints)  # the robot's state comes in meanwhile
        return np.tile(state, (100, 1))

    rig = make(slow, max_latency_s=1.0)
    rig.frames()
    until(lambda: sum(rig.runner.statistics.counts().values()))
    assert rig.runner.statistics.counts()["chunks"] == len(rig.sent) == sent
    assert rig.runner.statistics.counts()["dropped stale"] == 1 - sent


@pytest.mark.parametrize("end", ["deactivate", "stop", "activate again", "close"])
def test_a_chunk_that_is_being_made_is_dropped(make: Callable[..., Rig], end: str) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        began.set()
        assert go_on.wait(20)
        return np.tile(state, (50, 1))

    rig = make(slow)
    rig.frames()
    assert began.wait(20)
    if end == "close":
        assert not rig.runner.close(0.01)  # the policy is at work
    elif end == "stop":
        rig.runner.stop()
        assert rig.runner.stopped
    else:
        rig.runner.deactivate()
        if end == "activate again":
            rig.runner.activate()
    go_on.set()
    until(lambda: rig.runner.statistics.counts()["dropped deactivated"] == 1)
    assert rig.sent == []
    rig.frames()
    if end == "activate again":
        until(lambda: len(rig.sent) == 1)
    else:
        rig.quiet()
        assert rig.sent == []
    if end == "stop":
        assert not rig.runner.activate()  # a stop lasts
        rig.runner.clear_stop()
        assert not rig.runner.stopped
        assert rig.runner.activate()
        rig.frames()
        until(lambda: len(rig.sent) == 1)


def test_lasting_staleness_is_reported_with_its_input(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.frames()
    until(lambda: len(rig.sent) == 1)

    def without_one() -> None:
        rig.now += PERIOD_NS
        rig.add(rig.joints[0], *rig.cameras)
        time.sleep(0.01)

    for _ in range(15):  # 495 ms: within the grace
        without_one()
    rig.quiet()
    assert rig.notified == []
    for _ in range(5):
        without_one()
    until(lambda: rig.notified)
    rig.now += 120 * MS  # the others are late for a moment too
    rig.quiet()
    assert len(rig.notified) == 1
    assert rig.joints[1] in rig.notified[0][1]
    assert rig.joints[1] in rig.runner.fault_reason
    sent = len(rig.sent)
    rig.frames(2)
    until(lambda: len(rig.sent) == sent + 1)


def moving(images: Any, state: np.ndarray, task: str) -> np.ndarray:
    """The waists turn at 0.5 rad/s."""
    chunk = np.tile(state.astype(float), (50, 1))
    chunk[:, [0, 7]] += 0.01 * np.arange(1, 51)[:, None]
    return chunk


def in_motion(rig: Rig) -> list[Trajectory]:
    """Lets the robot be driven for 300 ms, and gives what was sent."""
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    rig.now += 300 * MS
    return rig.sent[0]


def from_now(sent: list[Trajectory], now: int) -> list[Trajectory]:
    """Without the points that have passed, with which every message begins."""
    cropped = []
    for one in sent:
        times = one.times + (one.start_ns - now) / 1e9
        ahead = times > 0
        assert times[0] < -0.05
        cropped.append(
            dataclasses.replace(
                one,
                times=times[ahead],
                positions=one.positions[ahead],
                velocities=one.velocities[ahead],
                start_ns=now,
            )
        )
    return cropped


def assert_brakes(sent: list[Trajectory], before: list[Trajectory]) -> None:
    """From where the robot is sent now, on the way it is on, to rest; soon."""
    for new, old in zip(sent, before, strict=True):
        first = new.start_ns + round(new.times[0] * 1e9)
        knot = int(np.argmin(np.abs(old.start_ns + old.times * 1e9 - first)))
        np.testing.assert_allclose(new.positions[0], old.positions[knot], atol=1e-9)
        np.testing.assert_allclose(new.velocities[0], old.velocities[knot], atol=1e-9)
        np.testing.assert_array_equal(new.velocities[-1], 0.0)
        assert new.times[-2] < 0.2
        assert new.times[-1] == pytest.approx(new.times[-2] + 1)  # a stop that comes late is not dropped
        np.testing.assert_array_equal(new.positions[-1], new.positions[-2])
        assert np.abs(new.positions[-1] - new.positions[0]).max() < 0.05
    assert np.abs(sent[0].velocities[0]).max() > 0.1


@pytest.mark.parametrize("how", ["deactivate", "stop", "close", "camera", "joints", "hang", "clock"])
def test_whatever_ends_an_activation_brings_the_robot_to_rest(make: Callable[..., Rig], how: str) -> None:
    go_on = threading.Event()

    def predict(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        if how == "hang" and rig.sent:
            assert go_on.wait(20)
        return moving(images, state, task)

    rig = make(predict)
    before = in_motion(rig)
    if how in ("deactivate", "stop", "close"):
        getattr(rig.runner, how)()
    elif how == "camera":
        until(lambda: (setattr(rig, "now", rig.now + MS), rig.add(*rig.joints, *rig.cameras[1:]), len(rig.sent) > 1)[2])
        assert rig.cameras[0] in rig.runner.fault_reason
    elif how == "joints":
        until(lambda: (setattr(rig, "now", rig.now + MS), rig.add(*rig.cameras, rig.joints[1]), len(rig.sent) > 1)[2])
        assert rig.joints[0] in rig.runner.fault_reason
    elif how == "hang":
        rig.add(*rig.joints, *rig.cameras)  # taken up, and never finished
        until(lambda: len(rig.sent) > 1)
        assert "has been at work for" in rig.runner.fault_reason
    elif how == "clock":
        time.sleep(0.1)
        rig.now -= 10**9
        until(lambda: len(rig.sent) > 1)
        assert "the clock jumped back" in rig.runner.fault_reason
    until(lambda: len(rig.sent) == 2)
    if how == "clock":  # the same on the new clock, but for the time between two looks at it
        speeds = from_now(rig.sent[1], rig.now)[0].velocities[:, 0]
        assert speeds[0] > 0.3
        assert speeds[-1] == 0
        assert (np.diff(speeds[1:]) <= 0).all()  # from the splice on
    else:
        assert_brakes(from_now(rig.sent[1], rig.now), before)
    rig.quiet()  # nothing is sent twice
    go_on.set()
    if how in ("camera", "joints", "hang", "clock"):
        rig.now += 3 * 10**9 // 2  # at rest by then; more would be a jump of the clock
        for _ in range(3):
            rig.frames()
            time.sleep(0.05)
        until(lambda: len(rig.sent) > 2)
        until(lambda: rig.runner.fault_reason is None)


def test_a_policy_that_hangs_is_reported_in_the_next_activation_too(make: Callable[..., Rig]) -> None:
    go_on = threading.Event()

    def hang(*_: Any) -> Any:
        assert go_on.wait(20)
        return np.zeros((50, 14))

    rig = make(hang)
    rig.frames()
    until(lambda: rig.runner.fault_reason)
    rig.runner.deactivate()
    rig.runner.activate()
    until(lambda: "has been at work for" in (rig.runner.fault_reason or ""))
    rig.predict = moving
    go_on.set()
    until(lambda: rig.runner.statistics.counts()["dropped deactivated"] == 1)
    rig.frames(2)
    until(lambda: rig.sent)


def test_a_chunk_that_took_longer_than_policy_timeout_is_dropped(make: Callable[..., Rig]) -> None:
    def slow(*_: Any) -> Any:
        time.sleep(1.2)  # policy_timeout is 1 s; the robot's clock stands still
        return np.zeros((50, 14))

    rig = make(slow, max_latency_s=10.0)
    rig.frames()
    until(lambda: rig.runner.statistics.counts()["dropped stale"] == 1)
    assert "policy_timeout is 1 s" in rig.runner.fault_reason
    assert rig.sent == []


def test_a_chunk_made_across_a_jump_of_the_clock_is_dropped(make: Callable[..., Rig]) -> None:
    def jumping(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        rig.now += 900 * MS
        time.sleep(0.1)  # the watchdog looks
        rig.now -= 500 * MS
        until(lambda: rig.runner.fault_reason)
        rig.add(*rig.joints)  # the chunk looks 400 ms old, of stamps of the new clock
        return np.tile(state, (100, 1))

    rig = make(jumping)
    rig.frames()
    until(lambda: rig.runner.statistics.counts()["dropped stale"] == 1)
    assert "the clock jumped back" in rig.runner.fault_reason
    assert rig.sent == []


def test_a_state_outside_the_limits_is_one_fault_however_long_it_lasts(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    for _ in range(20):
        rig.now += PERIOD_NS
        rig.add(*rig.joints, *rig.cameras, position=0.08)
        time.sleep(0.01)
    until(lambda: rig.runner.fault_reason)
    assert (
        "left_finger: the robot reports 0.080, outside [0.01844, 0.058] by more than 0.006" in rig.runner.fault_reason
    )
    rig.quiet()
    assert rig.runner.faults == 1
    assert len(rig.notified) == 1
    assert rig.failures == []
    rig.now += 2 * 10**9 - MS  # the last chunk has come to its end
    sent = len(rig.sent)
    for _ in range(3):
        rig.frames()
        time.sleep(0.05)
    until(lambda: len(rig.sent) > sent)
    assert rig.runner.fault_reason is None


def test_each_fault_is_reported_however_soon_it_comes_after_another(make: Callable[..., Rig]) -> None:
    rig = make(lambda *_: np.full((5, 14), np.nan))
    for number, chunk in enumerate((np.full((5, 14), np.nan), np.zeros((5, 13)), np.full((5, 14), np.nan)), 1):
        rig.predict = lambda *_, chunk=chunk: chunk
        rig.frames()
        until(lambda number=number: rig.runner.statistics.counts()["refused"] == number)
    rig.quiet()
    assert ["not finite" in text for _, text in rig.notified] == [True, False]


def test_a_watchdog_that_fails_is_reported_and_nothing_is_sent(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    monkeypatch.setattr(rig.inputs, "missing", lambda now_ns: 1 / 0)
    until(lambda: rig.failures)
    assert "the watchdog failed: ZeroDivisionError" in rig.failures[0]
    rig.frames()
    rig.quiet()
    assert rig.sent == []


def test_a_watchdog_that_fails_during_a_motion_stops_the_robot(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(lambda images, state, task: state + 0.002 * np.arange(1, 51)[:, None])
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    rig.now += 600 * MS
    monkeypatch.setattr(rig.inputs, "missing", lambda now_ns: 1 / 0)
    until(lambda: rig.failures)
    before, stop = rig.sent[0][0], from_now(rig.sent[1], rig.now)[0]
    assert np.abs(before.velocities[:-1]).max() > 0.05
    assert not stop.velocities[-1].any()
    assert stop.times[-2] < 0.2  # the last says that it rests there
    rig.quiet()


def test_after_too_many_faults_the_owner_is_notified_and_nothing_is_sent(make: Callable[..., Rig]) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rig = make(fail)
    for number in range(1, 6):
        rig.frames()
        until(lambda number=number: rig.runner.statistics.counts()["policy errors"] == number)
    until(lambda: rig.failures)
    assert rig.failures[0].startswith("5 faults since the activation, the last: RuntimeError: CUDA error")
    rig.predict = moving
    rig.frames()
    rig.quiet()
    assert rig.sent == []
    rig.runner.activate()
    rig.frames(2)
    until(lambda: rig.sent)


def test_chunks_follow_on_from_each_other(make: Callable[..., Rig]) -> None:
    rig = make(moving)
    for _ in range(20):
        rig.due_frames()
        number = len(rig.sent)
        until(lambda number=number: len(rig.sent) > number)
    # There is no point in the first 200 ms, however many chunks come by then.
    begun = rig.sent[0][0].start_ns + round(rig.sent[0][0].times[0] * 1e9)
    later = [one for one in rig.sent if one[0].start_ns >= begun]
    assert len(later) > 2
    for before, after in pairwise(later):
        times = [each.start_ns + np.round(each.times * 1e9).astype(np.int64) for each in (before[0], after[0])]
        common = np.intersect1d(*times)[0]
        assert common == times[1][0]
        old, new = int(np.searchsorted(times[0], common)), 0
        np.testing.assert_array_equal(before[0].positions[old], after[0].positions[new])
        np.testing.assert_array_equal(before[0].velocities[old], after[0].velocities[new])
    spreads = rig.runner.statistics.spreads()
    assert spreads["splice position gap (rad)"].count == len(rig.sent)


def test_real_time_chunking_gets_the_elapsed_and_the_delay_steps(embodiment: Embodiment) -> None:
    def slow(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        rig.now += 60 * MS  # three control steps
        rig.add(*rig.joints)
        return moving(images, state, task)

    rig = Rig(embodiment, ReplanConfig(0), slow, schedule=ScheduleSettings(mode="rtc")).started()
    for number in range(3):
        rig.now += 7 * MS
        rig.frames()
        until(lambda number=number: len(rig.sent) == number + 1)
    assert rig.continuing[0] == {}
    # 60 ms of the policy's, 40 ms until the next frames; then the 60 ms again, and 20 ms of a message's way.
    assert rig.continuing[1:] == [{"elapsed_steps": 5, "delay_steps": 4}] * 2
    assert rig.runner.close(20)


def test_joint_states_that_are_late_when_a_chunk_is_there_cost_the_chunk_alone(make: Callable[..., Rig]) -> None:
    rig = make()

    def slow(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        rig.now += 60 * MS  # without joint states: their tolerance is 50 ms
        return moving(images, state, task)

    rig.predict = slow
    rig.frames()
    until(lambda: rig.runner.statistics.counts()["dropped stale"] == 1)
    assert rig.sent == []
    assert rig.runner.faults == 0
    assert rig.runner.fault_reason is None
    rig.predict = moving
    rig.frames()
    until(lambda: len(rig.sent) == 1)


def test_the_log_has_a_line_for_every_chunk_and_safe_stop(
    make: Callable[..., Rig], embodiment: Embodiment, tmp_path: Path
) -> None:
    log = RunLog(tmp_path / "logs")
    rig = Rig(embodiment, ReplanConfig(0), moving, log=log).started()
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    rig.runner.stop()
    assert rig.runner.close(20)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["activated", "chunk", "stopped"]
    assert lines[1] | {"skipped": 1, "limits_hit": 0} == lines[1]
    assert lines[1]["time"] == pytest.approx(rig.now / 1e9)
    with pytest.raises(ClpError, match="log cannot be written"):
        RunLog(log.path)


def test_a_clock_that_jumps_back_is_reported_and_survived(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    rig.now -= 500 * MS
    until(lambda: any("jumped back" in text for _, text in rig.notified))
    rig.quiet()
    rig.frames(3)
    until(lambda: len(rig.sent) >= 2)


def test_an_image_that_cannot_be_decoded_causes_a_safe_stop(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    monkeypatch.setitem(globals(), "JPEG", JPEG[: len(JPEG) // 2])
    rig.frames()
    until(lambda: rig.runner.statistics.counts()["refused"] == 1)
    assert "cut off" in rig.runner.fault_reason
    monkeypatch.undo()
    rig.frames()
    until(lambda: rig.sent)


def test_the_instruction_holds_from_the_next_chunk_on(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    rig.runner.instruction = "do that"
    rig.due_frames()
    until(lambda: len(rig.sent) == 2)
    assert rig.tasks == ["do it", "do that"]


def test_limits_hit_are_counted(make: Callable[..., Rig]) -> None:
    beyond = np.zeros((5, 14))
    beyond[:, [6, 13]] = 9.0  # grippers wider than they open
    rig = make(lambda images, state, task: beyond)
    rig.frames()
    until(lambda: rig.sent)
    until(lambda: rig.runner.statistics.counts()["limits hit"] == 5 * 2)
    for number, controller in ((1, "left_gripper"), (3, "right_gripper")):
        assert rig.sent[0][number].controller == controller
        assert rig.sent[0][number].positions.max() <= 0.058


def test_stamps_ahead_of_the_clock_are_not_used(embodiment: Embodiment) -> None:
    rig = Rig(embodiment, ReplanConfig(0))
    rig.frames(3)
    rig.inputs.take(rig.now, {})
    rig.add(rig.cameras[1], age_ns=-101 * MS)
    with pytest.raises(IncompleteError, match="101 ms in the future") as caught:
        rig.inputs.take(rig.now, {})
    assert [one.topic for one in caught.value.missing] == [rig.cameras[1]]
    assert rig.runner.close(20)


def test_input_states_say_rate_age_and_what_was_dropped(embodiment: Embodiment) -> None:
    rig = Rig(embodiment, ReplanConfig(0))
    rig.frames(3)
    rig.add(rig.cameras[0])  # the same stamp again
    rig.now += 7 * MS
    states = rig.inputs.states(rig.now)
    assert states[rig.cameras[0]].age_ms == 7
    assert (states[rig.cameras[0]].dropped, states[rig.cameras[0]].refused) == (1, "out of order")
    assert (states[rig.cameras[1]].dropped, states[rig.cameras[1]].refused) == (0, None)
    assert states[rig.cameras[0]].rate_hz > states[rig.cameras[1]].rate_hz > 0
    assert rig.inputs.states(rig.now)[rig.cameras[1]].rate_hz == 0
    assert rig.runner.close(20)


def test_windows_keep_the_latest_values_only() -> None:
    statistics = Statistics()
    statistics.record("latency", 1e6)  # a model warming up
    values = np.random.default_rng(0).uniform(1, 2, WINDOW)
    for value in values:
        statistics.record("latency", value)
    spread = statistics.spreads()["latency"]
    assert (spread.p50, spread.p99) == pytest.approx(np.percentile(values, (50, 99)))
    assert (spread.maximum, spread.count) == (values.max(), WINDOW)


def test_a_stop_does_not_wait_for_a_chunk_that_is_being_joined(embodiment: Embodiment) -> None:
    """Nor does the watchdog; and the chunk is not sent any more."""
    rig = Rig(embodiment, ReplanConfig(0), moving).started()
    in_motion(rig)
    sent = len(rig.sent)
    joining, go_on = threading.Event(), threading.Event()
    plan = rig.runner._output.plan

    def slow(*given: Any) -> Any:
        joining.set()
        assert go_on.wait(20)
        return plan(*given)

    rig.runner._output.plan = slow
    rig.frames()
    assert joining.wait(20)
    # The watchdog goes on looking: a joint that leaves its limits is noticed meanwhile.
    rig.now += PERIOD_NS
    rig.add(*rig.joints, position=3.0)
    until(lambda: len(rig.sent) == sent + 1)  # the brake
    assert rig.runner.fault_reason is not None
    started = time.perf_counter()
    rig.runner.stop()
    assert time.perf_counter() - started < 0.1
    go_on.set()
    until(lambda: rig.runner.statistics.counts()["dropped deactivated"] == 1)
    rig.quiet()
    assert rig.runner.close(20)


def test_a_stop_during_publishing_is_sent_last_and_the_watchdog_continues(embodiment: Embodiment) -> None:
    rig = Rig(embodiment, ReplanConfig(0), moving)
    leaving, go_on = threading.Event(), threading.Event()

    def send(messages: Any) -> None:
        if len(rig.sent) == 1:
            leaving.set()
            assert go_on.wait(20)
        rig.sent.append(messages)

    rig.runner._output._send = send
    rig.started()
    in_motion(rig)
    rig.frames()
    assert leaving.wait(20)
    # A joint that leaves its limits is noticed though the chunk has not left yet.
    rig.now += PERIOD_NS
    rig.add(*rig.joints, position=3.0)
    until(lambda: rig.runner.fault_reason)
    assert len(rig.sent) == 1
    stopping = threading.Thread(target=rig.runner.stop)
    stopping.start()
    until(lambda: rig.runner.stopped and rig.runner.fault_reason is None)
    time.sleep(0.05)
    assert stopping.is_alive()  # it has not returned before the brake has left
    go_on.set()
    stopping.join(20)
    assert len(rig.sent) == 3
    assert_brakes(from_now(rig.sent[2], rig.now), rig.sent[1])
    assert not rig.runner.activate()
    rig.frames()
    rig.quiet()
    assert rig.runner.close(20)


def test_a_chunk_is_joined_anew_if_something_was_sent_meanwhile(embodiment: Embodiment) -> None:
    rig = Rig(embodiment, ReplanConfig(0), moving).started()
    in_motion(rig)
    sent = len(rig.sent)
    plan, planned = rig.runner._output.plan, []

    def interrupted(*given: Any) -> Any:
        planned.append(plan(*given))
        if len(planned) == 1:
            rig.runner._output.safe_stop()
        return planned[-1]

    rig.runner._output.plan = interrupted
    rig.frames()
    until(lambda: len(rig.sent) == sent + 2)
    assert len(planned) == 2
    np.testing.assert_array_equal(rig.sent[-1][0].positions, planned[1].messages[0].positions)
    assert_brakes(from_now(rig.sent[sent], rig.now), rig.sent[sent - 1])
    assert rig.runner.close(20)


def test_a_message_that_cannot_be_sent_leaves_the_schedule_as_it_was(embodiment: Embodiment) -> None:
    rig = Rig(embodiment, ReplanConfig(0), moving)
    output, fails = rig.runner._output, []

    def send(messages: Any) -> None:
        if fails:
            raise RuntimeError(fails.pop())
        rig.sent.append(messages)

    output._send = send
    rig.started()
    in_motion(rig)
    sent, reference, stamp = len(rig.sent), output._schedule.reference, output.stamp_ns
    fails.append("no publisher")
    rig.frames()
    # The brake goes on from what was sent, not from what was not.
    until(lambda: len(rig.sent) == sent + 1)
    assert "no publisher" in rig.runner.fault_reason
    assert_brakes(from_now(rig.sent[sent], rig.now), rig.sent[sent - 1])
    assert output.stamp_ns > stamp
    np.testing.assert_array_equal(output._schedule.reference.sample(rig.now), reference.sample(rig.now))
    assert rig.runner.close(20)


def test_a_controller_is_not_led_from_outside_the_limits_to_their_edge_at_once(embodiment: Embodiment) -> None:
    """One that begins at the measured state follows points that have passed at once."""
    sent: list[list[Trajectory]] = []
    output = TrajectoryOutput(embodiment, ScheduleSettings(), sent.append, lambda: START_NS)
    output.start(embodiment.controllers)
    state = np.zeros(embodiment.action_size)
    state[0] = embodiment.joints[0].upper + 0.04
    output.chunk(np.tile(np.minimum(state, [joint.upper for joint in embodiment.joints]), (50, 1)), START_NS, state)
    first = {one.controller: one.start_ns + one.times[0] * 1e9 - START_NS for one in sent[0]}
    assert first["left_arm"] > 200 * MS
    assert first["right_arm"] < 0


def test_a_safe_stop_that_cannot_be_sent_is_sent_the_next_time(embodiment: Embodiment) -> None:
    now, sent, fails = [START_NS], [], [RuntimeError("no publisher")]

    def send(messages: Any) -> None:
        if len(sent) == 1 and fails:
            raise fails.pop()
        sent.append(messages)

    output = TrajectoryOutput(embodiment, ScheduleSettings(), send, lambda: now[0])
    state = np.zeros(embodiment.action_size)
    output.chunk(0.5 * np.linspace(0, 0.4, 50)[:, None] * np.ones(embodiment.action_size), START_NS, state)
    now[0] += 500 * MS
    with pytest.raises(RuntimeError):
        output.safe_stop()
    assert output.safe_stop()
    assert not output.safe_stop()
    assert len(sent) == 2


def test_a_stop_that_can_never_be_sent_ends_the_activation_and_no_thread(embodiment: Embodiment) -> None:
    broken = []

    def policy(images: Any, state: np.ndarray, task: str) -> np.ndarray:
        if broken:
            raise RuntimeError("no policy")
        return moving(images, state, task)

    rig = Rig(embodiment, ReplanConfig(0), policy)
    send = rig.runner._output._send

    def sometimes(messages: Any) -> None:
        if broken:
            raise RuntimeError("no publisher")
        send(messages)

    rig.runner._output._send = sometimes
    rig.started()
    in_motion(rig)
    broken.append(True)
    rig.frames()
    until(lambda: rig.failures)
    assert rig.failures == ["the robot cannot be braked: RuntimeError: no publisher"]
    assert rig.runner._working.is_alive()
    assert rig.runner._watching.is_alive()
    broken.clear()
    sent = len(rig.sent)
    rig.runner.activate()
    rig.due_frames()
    until(lambda: len(rig.sent) > sent and rig.runner.fault_reason is None)
    assert rig.runner.close(20)


@pytest.fixture(scope="module")
def scaled(embodiment: Embodiment) -> Embodiment:
    """A robot whose arms' controllers know of its speed scaling, and whose grippers' do not."""
    document = embodiment.model_dump()
    document["speed_scaling"] = {"topic": "/speed", "controllers": ["left_arm", "right_arm"]}
    return Embodiment.model_validate(document)


def test_a_robot_that_is_paused_is_sent_nothing_and_stays_where_it_is(scaled: Embodiment) -> None:
    rig = Rig(scaled, ReplanConfig(0), moving).started()
    rig.runner.set_speed_scaling(1.0)
    before = in_motion(rig)
    end = threading.Event()

    def publish() -> None:  # as the robot does, or else it counts as stale
        while not end.wait(0.05):
            rig.runner.set_speed_scaling(rig.published)

    rig.published = 0.0
    rig.runner.set_speed_scaling(0.0)
    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    # The grippers' controllers are not scaled, so they get a new trajectory at once. The arms' controllers stand still.
    until(lambda: len(rig.sent) == 2)
    assert [one.controller for one in rig.sent[1]] == ["left_gripper", "right_gripper"]
    # A pause that lasts ends what was followed.
    until(lambda: len(rig.sent) == 3)
    assert "paused, or in a protective stop" in rig.runner.fault_reason
    for new, old in zip(rig.sent[2], before, strict=True):
        assert not new.velocities.any()
        place = CubicHermiteSpline(old.start_ns / 1e9 - rig.now / 1e9 + old.times, old.positions, old.velocities)(0.0)
        np.testing.assert_allclose(new.positions, np.tile(place, (2, 1)), atol=1e-6)
        assert new.start_ns + new.times[0] * 1e9 < rig.now < new.start_ns + new.times[-1] * 1e9
    assert rig.runner.faults == 0  # somebody has stopped it: nothing is broken
    chunks = len(rig.continuing)
    rig.frames(2)
    rig.quiet()
    assert len(rig.continuing) == chunks  # nothing is predicted either
    rig.published = 1.0
    rig.runner.set_speed_scaling(1.0)
    rig.frames(2)
    until(lambda: len(rig.sent) == 4 and rig.runner.fault_reason is None)
    end.set()
    publisher.join()
    rig.runner.close()


def test_a_speed_scaling_that_is_published_no_more_stops_the_robot(scaled: Embodiment) -> None:
    rig = Rig(scaled, ReplanConfig(0), moving).started()
    before = in_motion(rig)  # it was never published: full speed
    rig.runner.set_speed_scaling(1.0)
    until(lambda: len(rig.sent) == 2)
    assert "no speed scaling for" in rig.runner.fault_reason
    assert_brakes(from_now(rig.sent[1], rig.now), before)
    rig.runner.close()


@pytest.mark.parametrize("wrong", [np.nan, -1.0, np.inf, 1.5])
def test_a_robot_whose_speed_scaling_cannot_be_used_is_not_driven(scaled: Embodiment, wrong: float) -> None:
    rig = Rig(scaled, ReplanConfig(0), moving).started()
    in_motion(rig)
    with pytest.raises(ClpError, match="speed scaling"):
        rig.runner.set_speed_scaling(wrong)
    until(lambda: "no speed scaling for" in (rig.runner.fault_reason or ""))
    rig.runner.set_speed_scaling(1.02)  # noise of its measurement: no controller is sped up
    assert rig.runner.speed_scaling == 1.0
    rig.runner.close()


def test_steps_of_a_robot_at_half_its_speed_pass_as_slowly(scaled: Embodiment) -> None:
    rig = Rig(scaled, ReplanConfig(10), moving, schedule=ScheduleSettings(mode="rtc")).started()
    rig.runner.set_speed_scaling(0.5)
    rig.frames()
    until(lambda: len(rig.sent) == 1)
    observed = rig.now
    rig.now += 600 * MS
    rig.frames()
    rig.runner.set_speed_scaling(0.5)
    until(lambda: len(rig.continuing) == 2)
    assert rig.continuing[1]["elapsed_steps"] == round(0.5 * (rig.now - observed) / scaled.period_ns)
    arm, gripper = rig.sent[0][0], rig.sent[0][1]
    # The gripper's controller does not know of the scaling: its times are twice the arm's.
    assert np.diff(gripper.times).mean() == pytest.approx(2 * np.diff(arm.times).mean(), rel=1e-6)
    rig.runner.close()
