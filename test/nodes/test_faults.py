# SPDX-License-Identifier: Apache-2.0
"""Every fault in the table of doc/reference/policy-faults.md, injected over real DDS: what is sent, and how it ends."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.msg import Transition
from policy_tools import (
    LEFT,
    MS,
    SENT_TOPICS,
    Driver,
    Robot,
    SimulatedClock,
    assert_continues,
    knots,
    stamp_ns,
    start_node,
)
from ros_tools import NodeProcess, Peer, own_domain, wait_for
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from clp_ros.control.output import PAST_NS
from clp_ros.robots.embodiment import load_embodiment

EMBODIMENT = load_embodiment("aloha_bimanual")
HIGH, LEFT_CAMERA, RIGHT_CAMERA = (camera.topic for camera in EMBODIMENT.cameras.values())
LEFT_JOINTS, RIGHT_JOINTS = (states.topic for states in EMBODIMENT.joint_states.values())
ARMS = (SENT_TOPICS[0], SENT_TOPICS[2])
# Both waists turn to and fro, never both slow at once.
WAVE = "please wave"

Spoil = Callable[[Any], bool | None]


def lose(message: Any) -> bool:
    return False


def without_elbow(message: Any) -> None:
    place = message.name.index("elbow")
    message.name.pop(place)
    message.position.pop(place)


def set_joint(joint: str, position: float) -> Spoil:
    def spoil(message: Any) -> None:
        message.position[message.name.index(joint)] = position

    return spoil


def stamped(offset_ns: int) -> Spoil:
    """Another clock."""
    return restamped(lambda stamp: stamp + offset_ns)


def restamped(change: Callable[[int], int]) -> Spoil:
    def spoil(message: Any) -> None:
        stamp = message.header.stamp
        stamp.sec, stamp.nanosec = divmod(change(stamp.sec * 10**9 + stamp.nanosec), 10**9)

    return spoil


def frozen() -> Spoil:
    """The first stamp again and again."""
    first: list[int] = []
    return restamped(lambda stamp: (first or first.append(stamp) or first)[0])


def backwards() -> Spoil:
    """Each stamp before the last: messages out of order."""
    stamps: list[int] = []
    return restamped(lambda stamp: (stamps.append(stamps[-1] - MS if stamps else stamp - MS), stamps[-1])[1])


def cut_off(message: Any) -> None:
    del message.data[len(message.data) // 2 :]


@dataclass(frozen=True)
class Fault:
    """A fault, and what is said of it.

    Attributes:
        words: All in the log's line, and in the status.
        spoil: What becomes of messages, by topic.
        task: The policy's mischief.
        is_sent: Whether the node sends anything: the brake.
    """

    words: tuple[str, ...]
    spoil: dict[str, Callable[[], Spoil]] = field(default_factory=dict)
    task: str = WAVE
    is_sent: bool = True


FAULTS = {
    "a camera that dies": Fault((LEFT_CAMERA, "ms old, tolerance 100 ms"), {LEFT_CAMERA: lambda: lose}),
    "joint states that end": Fault((LEFT_JOINTS, "ms old, tolerance 50 ms"), {LEFT_JOINTS: lambda: lose}),
    "old images": Fault((RIGHT_CAMERA, "ms old, tolerance 100 ms"), {RIGHT_CAMERA: lambda: stamped(-400 * MS)}),
    "old joint states": Fault((RIGHT_JOINTS, "ms old, tolerance 50 ms"), {RIGHT_JOINTS: lambda: stamped(-300 * MS)}),
    "a frozen camera": Fault((HIGH, "ms old", "out of order"), {HIGH: frozen}),
    "frozen joint states": Fault((LEFT_JOINTS, "ms old", "out of order"), {LEFT_JOINTS: frozen}),
    "images out of order": Fault((RIGHT_CAMERA, "ms old", "out of order"), {RIGHT_CAMERA: backwards}),
    "joint states out of order": Fault((RIGHT_JOINTS, "ms old", "out of order"), {RIGHT_JOINTS: backwards}),
    "images of the future": Fault((HIGH, "ms in the future"), {HIGH: lambda: stamped(700 * MS)}),
    "joint states of the future": Fault((LEFT_JOINTS, "ms in the future"), {LEFT_JOINTS: lambda: stamped(400 * MS)}),
    "stamps of another clock": Fault(
        (LEFT_CAMERA, "ahead of the receive stamps", "different clocks"), {LEFT_CAMERA: lambda: stamped(5000 * MS)}
    ),
    "joint states without a joint": Fault(
        (RIGHT_JOINTS, "joint 'elbow' is", "ms old"), {RIGHT_JOINTS: lambda: without_elbow}
    ),
    "joint states with NaN": Fault(
        (LEFT_JOINTS, "the position of joint 'elbow' is not finite"), {LEFT_JOINTS: lambda: set_joint("elbow", np.nan)}
    ),
    "a joint outside its limits": Fault(
        ("the robot reports 1.500, outside [-1.85, 1.2566]", "shoulder"),
        {RIGHT_JOINTS: lambda: set_joint("shoulder", 1.5)},
    ),
    "an image that cannot be decoded": Fault((HIGH, "JPEG", "is cut off"), {HIGH: lambda: cut_off}),
    "NaN in a chunk": Fault(("the policy's chunk is not finite at step 3, joint 'elbow'",), task="please wave, nan"),
    "Inf in a chunk": Fault(("the policy's chunk is not finite at step 5, joint 'shoulder'",), task="please wave, inf"),
    "a chunk of another size": Fault(
        ("the policy's chunk has shape (100, 13), not (steps, 14)",), task="please wave, narrow"
    ),
    "a chunk that begins too far away": Fault(
        ("the chunk begins 0.500 from where the arm is, max_deviation allows 0.3", "shoulder"), task="please wave, jump"
    ),
    "a chunk that is too fast": Fault(
        ("inside its limits the arm is left", "behind the chunk", "waist"), task="please wave, leap"
    ),
    "a chunk that is too old": Fault(
        ("a chunk was dropped: its observation was", "max_latency is 1 s"), task="please wave, slow"
    ),
    "a chunk that comes after its last step": Fault(
        ("after the time its last step was for",), task="please wave, late", is_sent=False
    ),
    "a policy that raises": Fault(("KeyError: 'a model may raise anything'",), task="please wave, raise"),
    "a policy that exits": Fault(("SystemExit: a library gives up",), task="please wave, exit"),
    "a GPU that fails": Fault(("RuntimeError: CUDA error: device-side assert triggered",), task="please wave, cuda"),
    "a GPU without memory": Fault(("OutOfMemoryError: CUDA out of memory",), task="please wave, memory"),
    "a policy that hangs": Fault(("the policy has been at work for",), task="please wave, hang"),
}

# In `make test-all` only: each takes the same way through the node as another fault here. All that a policy does wrong
# is in test_runner.py::test_whatever_the_policy_does_the_loop_goes_on. Joint states and images are judged alike, which
# test_observation.py shows.
SLOW = {
    "old joint states",
    "frozen joint states",
    "joint states out of order",
    "joint states of the future",
    "Inf in a chunk",
    "a chunk of another size",
    "a policy that exits",
    "a GPU that fails",
    "a GPU without memory",
}
assert FAULTS.keys() >= SLOW


@pytest.fixture(scope="module")
def ros_domain() -> Iterator[int]:
    with own_domain() as domain:
        yield domain


@pytest.fixture(scope="module")
def peer(ros_domain: int) -> Iterator[Peer]:
    with Peer(ros_domain) as peer:
        yield peer


@pytest.fixture(scope="module")
def robot(peer: Peer) -> Iterator[Robot]:
    with Robot(peer, EMBODIMENT) as robot:
        yield robot


@pytest.fixture(scope="module")
def driver(peer: Peer) -> Driver:
    return Driver(peer)


@pytest.fixture(scope="module")
def node(driver: Driver, robot: Robot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """One node for all faults: that it goes on after each is what is shown."""
    folder = tmp_path_factory.mktemp("faults")
    with start_node(folder, task=WAVE, replan_steps=5, max_faults=0, policy_timeout=1.4) as node:
        driver.up()
        driver.expect_motion()
        yield node
        code = node.stop()
        assert "Traceback" not in node.log
        assert code == 0, node.log


def times_logged(node: NodeProcess, words: tuple[str, ...]) -> int:
    """How often a fault is in the log."""
    return sum("safe stop: " in line and all(word in line for word in words) for line in node.log.splitlines())


def assert_inside_limits(messages: dict[str, JointTrajectory]) -> None:
    for controller in EMBODIMENT.controllers.values():
        _, positions, speeds = knots(messages[controller.topic])
        assert np.isfinite(positions).all()
        for joint, where, speed in zip(controller.joints, positions.T, speeds.T, strict=True):
            assert joint.lower - 1e-6 <= where.min() <= where.max() <= joint.upper + 1e-6
            assert np.abs(speed).max() <= joint.velocity * (1 + 1e-6)


def assert_brakes(messages: dict[str, JointTrajectory]) -> None:
    """From motion to rest, soon, and a second at rest: a controller drops a message whose end has passed."""
    assert_inside_limits(messages)
    fastest = 0.0
    for topic, message in messages.items():
        times, positions, speeds = knots(message)
        assert not speeds[-2:].any()
        np.testing.assert_array_equal(positions[-1], positions[-2])
        assert times[-1] - times[-2] == 1000 * MS
        now_ns = stamp_ns(message) + PAST_NS + 2 * EMBODIMENT.period_ns
        assert 0 < times[-2] - now_ns < 300 * MS
        now = np.flatnonzero(times <= now_ns)[-1]  # the knots before it have been followed
        assert np.abs(positions[-1] - positions[now]).max() < 0.2
        fastest = max(fastest, np.abs(speeds[now]).max() if topic in ARMS else 0.0)
    assert fastest > 0.05


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAULTS])
def test_on_a_fault_the_robot_is_braked_to_rest_until_it_is_over(
    node: NodeProcess, driver: Driver, robot: Robot, name: str
) -> None:
    fault = FAULTS[name]
    before = times_logged(node, fault.words)
    # A message begins 100 ms before now: the arms have been on their way for so long.
    wait_for(lambda: max(np.abs(knots(driver.last()[topic])[2][0]).max() for topic in ARMS) > 0.05, "moving arms")
    try:
        robot.spoil = {topic: make() for topic, make in fault.spoil.items()}
        driver.set_task(fault.task)
        driver.expect_status(DiagnosticStatus.WARN, "safe stop: ", *fault.words)
        driver.expect_quiet(0.3)
        last = driver.last()
        if fault.is_sent:
            assert_brakes(last)
            for received in driver.sent.values():
                assert_continues(received[-1], received[-2])
        else:
            assert not any(knots(message)[2][-1].any() for message in last.values())
        wait_for(lambda: times_logged(node, fault.words), "the fault in the log")
        assert times_logged(node, fault.words) <= before + 1
    finally:
        robot.spoil = {}
        driver.set_task(WAVE)
    driver.expect_motion()


def test_a_robot_that_was_moved_away_is_braked_and_goes_on_from_where_it_is(
    node: NodeProcess, driver: Driver, robot: Robot
) -> None:
    words = ("from where it was sent, max_deviation allows 0.3", "forearm_roll")
    well, start = robot.positions, time.time_ns()
    try:
        robot.positions = well | {LEFT_JOINTS: LEFT | {"forearm_roll": 0.6}}
        wait_for(lambda: times_logged(node, words), "the fault in the log")
        wait_for(lambda: knots(driver.sent[ARMS[0]][-1])[1][-1, 3] == pytest.approx(0.6), "chunks from the new place")
    finally:
        robot.positions = well
    # What came before the first chunk from the new place is the brake, and nothing goes from the old place to the new.
    received = driver.sent[ARMS[0]]
    new = next(i for i, message in enumerate(received) if stamp_ns(message) > start and knots(message)[1][-1, 3] > 0.0)
    stamp = stamp_ns(received[new - 1])
    assert_brakes({topic: next(m for m in ms if stamp_ns(m) == stamp) for topic, ms in driver.sent.items()})
    assert_continues(received[new - 1], received[new - 2])
    np.testing.assert_allclose(knots(received[new])[1][:, 3], 0.6, atol=1e-6)
    wait_for(lambda: knots(driver.sent[ARMS[0]][-1])[1][-1, 3] == pytest.approx(-0.4), "the robot back again")


def counted(driver: Driver, what: str) -> int:
    """A count of the newest status; 0 where the node is not configured yet."""
    return int(driver.statuses[-1].values.get(what, 0)) if driver.statuses else 0


def test_positions_beyond_a_limit_go_to_the_limit_and_are_counted(node: NodeProcess, driver: Driver) -> None:
    try:
        driver.set_task("please wave, far")
        wait_for(lambda: counted(driver, "limits hit") > 0, "positions at their limits")
        grippers = [driver.sent[controller.topic] for controller in EMBODIMENT.controllers.values()][1::2]
        at_limit = pytest.approx(0.058)
        wait_for(lambda: all(received[-1].points[-1].positions[0] == at_limit for received in grippers), "the limit")
        assert_inside_limits(driver.last())
    finally:
        driver.set_task(WAVE)


def test_a_chunk_that_is_too_fast_is_followed_at_the_limits(node: NodeProcess, driver: Driver) -> None:
    try:
        driver.set_task("please rush")
        waists = lambda: knots(driver.last()[ARMS[0]])[2][:, 0]  # noqa: E731
        wait_for(lambda: np.abs(waists()).max() > 1.5, "a chunk at the limits")
        for _ in range(3):
            driver.expect_chunks()
            assert_inside_limits(driver.last())
    finally:
        driver.set_task(WAVE)
    driver.expect_motion()


@pytest.mark.parametrize("how", ["stop", "deactivate"])
def test_stop_and_deactivate_brake_within_one_control_step(
    node: NodeProcess, driver: Driver, peer: Peer, how: str
) -> None:
    driver.expect_motion()
    called = time.time_ns()
    try:
        if how == "stop":
            assert peer.call(Trigger, "/policy/stop").success
        else:
            assert driver.change(Transition.TRANSITION_DEACTIVATE)
        answered = time.time_ns()
        driver.expect_quiet(0.3)
        assert_brakes(driver.last())
        for received in driver.sent.values():
            assert_continues(received[-1], received[-2])
        # It has left before the service answers, and leaves the chunk at the first control step that it can be in time
        # for.
        before, brake = (driver.sent[ARMS[0]][number] for number in (-2, -1))
        made = stamp_ns(brake) + PAST_NS + 2 * EMBODIMENT.period_ns  # it begins so long before
        assert called < made < answered
        times, positions, _ = knots(brake)
        old_times, old, _ = knots(before)
        common = np.isin(old_times, times).nonzero()[0]
        same = np.isclose(old[common], positions[: len(common)], atol=1e-9).all(axis=1)
        differs = times[: len(common)][~same][0]
        lead, period = 20 * MS, EMBODIMENT.period_ns
        assert differs <= made + lead + 2 * period  # the knot at which it leaves is the chunk's still
        if how == "stop":
            driver.expect_status(DiagnosticStatus.WARN, "stopped by ~/stop")
    finally:
        if driver.state == "active":
            assert driver.change(Transition.TRANSITION_DEACTIVATE)
        assert driver.change(Transition.TRANSITION_ACTIVATE)
    driver.expect_motion()


@pytest.mark.usefixtures("ros_domain")
def test_when_the_clock_jumps_the_robot_is_braked_on_the_new_clock(tmp_path: Path) -> None:
    with (
        own_domain() as domain,
        Peer(domain) as peer,
        SimulatedClock(peer) as clock,
        Robot(peer, EMBODIMENT, clock) as robot,
    ):
        driver = Driver(peer)
        # No input is missed so soon: the jump is what holds the robot, until frames come again.
        given = {"use_sim_time": True, "task": WAVE, "replan_steps": 5, "input_timeout": 60.0}
        with start_node(tmp_path, **given) as node:
            driver.up()
            for jump_ns, way in ((-20_000 * MS, "back"), (30_000 * MS, "forward")):
                driver.expect_motion()
                driver.expect_motion()
                robot.spoil = dict.fromkeys(EMBODIMENT.topics, lose)
                clock.offset_ns += jump_ns
                driver.expect_status(DiagnosticStatus.WARN, f"safe stop: the clock jumped {way} by")
                driver.expect_quiet(0.3)
                assert times_logged(node, (f"the clock jumped {way} by",)) == 1
                assert_brakes(driver.last())
                for topic, received in driver.sent.items():
                    times, positions, speeds = knots(received[-1])
                    old_times, old, old_speeds = knots(received[-2])
                    assert abs(times[0] - clock()) < 10_000 * MS
                    if topic in ARMS:  # where the chunk was, to the last bit
                        (place,) = (old == positions[0]).all(axis=1).nonzero()[0]
                        np.testing.assert_array_equal(speeds[0], old_speeds[place])
                        assert abs(times[0] - old_times[place] - jump_ns) < 1000 * MS
                robot.spoil = {}
                driver.expect_motion()
                assert abs(stamp_ns(driver.last()[ARMS[0]]) - clock()) < 10_000 * MS
            assert node.stop() == 0
            assert "Traceback" not in node.log
