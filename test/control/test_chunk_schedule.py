# SPDX-License-Identifier: Apache-2.0
"""Chunks joined to one reference: continuous at every splice, inside the limits, at rest in the end, whatever comes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.interpolate import CubicHermiteSpline

from clp_ros.control.chunk_schedule import MODES, ChunkSchedule, LateError, ScheduleSettings
from clp_ros.control.reference import Reference
from clp_ros.control.safety import Limits, check, excess
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import load_embodiment

PERIOD_NS = 20_000_000
PERIOD = PERIOD_NS / 1e9
START_NS = 1_700_000_000 * 10**9
JOINTS = 3


def limits(acceleration: float = np.inf, velocity: float = 2.0) -> Limits:
    return Limits(
        tuple(f"joint_{i}" for i in range(JOINTS)),
        np.full(JOINTS, -1.5),
        np.full(JOINTS, 1.5),
        np.full(JOINTS, velocity),
        np.full(JOINTS, acceleration),
    )


def schedule(acceleration: float = np.inf, velocity: float = 2.0, **how: object) -> ChunkSchedule:
    return ChunkSchedule(limits(acceleration, velocity), PERIOD_NS, ScheduleSettings(**how))


def expert(times_s: np.ndarray) -> np.ndarray:
    """A smooth path, (times, joints)."""
    phase = np.asarray(times_s)[:, None] * np.array([1.0, 1.7, 2.3])
    return 0.4 * np.sin(phase)


def chunk_at(seconds: float, steps: int = 50, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    wanted = expert(seconds + np.arange(1, steps + 1) * PERIOD)
    rng = np.random.default_rng(seed)
    return wanted + noise * rng.standard_normal((1, JOINTS)) + noise / 5 * rng.standard_normal(wanted.shape)


def dense(reference: Reference, points: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (s), positions and velocities between the knots, by the cubic's own formula."""
    out = []
    for k in range(len(reference.times_ns) - 1):
        h = (reference.times_ns[k + 1] - reference.times_ns[k]) / 1e9
        p0, p1 = reference.positions[k : k + 2]
        v0, v1 = reference.velocities[k : k + 2]
        a2 = 3 * (p1 - p0) / h**2 - (2 * v0 + v1) / h
        a3 = -2 * (p1 - p0) / h**3 + (v0 + v1) / h**2
        for tau in np.linspace(0, h, points):
            at = (reference.times_ns[k] - START_NS) / 1e9 + tau
            out.append((at, p0 + v0 * tau + a2 * tau**2 + a3 * tau**3, v0 + 2 * a2 * tau + 3 * a3 * tau**2))
    times, positions, velocities = zip(*out, strict=True)
    return np.array(times), np.array(positions), np.array(velocities)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("latency_ms", [0, 50, 150, 300])
def test_splices_are_continuous_and_the_expert_is_followed(mode: str, latency_ms: int) -> None:
    plan = schedule(mode=mode)
    observed, executed = START_NS, None
    for number in range(20):
        now = observed + latency_ms * 1_000_000 + number * 37_000  # not on any grid
        seconds = (observed - START_NS) / 1e9
        measured = expert(np.array([seconds]))[0] if executed is None else executed.sample(now)[0]
        joined = plan.add(chunk_at(seconds, noise=0.01, seed=number), observed, now, measured)
        assert joined.reference.times_ns[0] > now
        if executed is not None:
            before, after = executed.sample(joined.splice_ns), plan.reference.sample(joined.splice_ns)
            np.testing.assert_array_equal(before, after)
            for time in range(now, joined.splice_ns, 1_000_000):
                np.testing.assert_allclose(executed.sample(time), plan.reference.sample(time), atol=1e-9)
        executed = plan.reference
        observed = max(observed + 10 * PERIOD_NS, now)
    times, positions, _ = dense(executed)
    while_driven = (times > (now - START_NS) / 1e9 + 0.3) & (times < (now - START_NS) / 1e9 + 0.5)
    assert np.abs(positions[while_driven] - expert(times[while_driven])).max() < 0.05
    check(executed.since(now), limits())


def test_steps_that_have_passed_are_left_out() -> None:
    plan = schedule()
    ramp = np.linspace(0.0, 0.49, 50)[:, None] * np.ones(JOINTS)
    joined = plan.add(ramp, START_NS, START_NS + 5 * PERIOD_NS, ramp[5])
    assert joined.splice_ns == START_NS + 6 * PERIOD_NS
    assert joined.skipped == 6
    # Step i is for i + 1 control steps after the observation.
    positions, _ = joined.reference.sample(START_NS + 30 * PERIOD_NS)
    np.testing.assert_allclose(positions, ramp[29], atol=1e-3)
    with pytest.raises(LateError):
        schedule().add(ramp, START_NS, START_NS + 50 * PERIOD_NS, ramp[-1])


def test_ensemble_is_the_weighted_mean_of_the_chunks_that_reach() -> None:
    plan = schedule(mode="ensemble", ensemble_decay=0.5)
    first, second = np.full((50, JOINTS), 0.1), np.full((50, JOINTS), 0.2)
    plan.add(first, START_NS, START_NS, np.full(JOINTS, 0.1))
    plan.add(second, START_NS + 10 * PERIOD_NS, START_NS + 10 * PERIOD_NS, np.full(JOINTS, 0.1))
    weights = np.exp([0.0, -0.5])
    both = (0.1 * weights[0] + 0.2 * weights[1]) / weights.sum()
    np.testing.assert_allclose(plan.reference.sample(START_NS + 30 * PERIOD_NS)[0], both, atol=1e-3)
    np.testing.assert_allclose(plan.reference.sample(START_NS + 57 * PERIOD_NS)[0], 0.2, atol=2e-3)


def test_a_policy_that_dies_ends_in_a_smooth_stop() -> None:
    plan = schedule(acceleration=8.0)
    joined = plan.add(chunk_at(0.0), START_NS, START_NS, expert(np.zeros(1))[0])
    end = joined.reference
    np.testing.assert_array_equal(end.velocities[-1], 0.0)
    assert excess(end, limits(8.0)).factor <= 1 + 1e-6
    assert plan.safe_stop(end.end_ns + 1) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("latency_ms", [0, 50, 150, 290])
def test_chunks_of_one_motion_change_nothing_at_the_splices(mode: str, latency_ms: int) -> None:
    """Not even when the motion takes most of the acceleration there is, and a splice lies where braking had begun."""

    def motion(times_ns: np.ndarray) -> np.ndarray:
        return 0.5 * (1 - np.cos(2.0 * (times_ns - START_NS) / 1e9))[:, None] * np.ones(JOINTS)

    plan = schedule(acceleration=2.5, mode=mode)  # of which it takes 2.0
    joined = plan.add(motion(START_NS + np.arange(1, 51) * PERIOD_NS), START_NS, START_NS, np.zeros(JOINTS))
    for observed in START_NS + 680_000_000 * np.arange(1, 6):
        now = int(observed) + latency_ms * 1_000_000
        chunk = motion(observed + np.arange(1, 51) * PERIOD_NS)
        joined = plan.add(chunk, int(observed), now, motion(np.array([now]))[0])
        on_the_way = joined.reference.times_ns < observed + 49 * PERIOD_NS
        times = joined.reference.times_ns[on_the_way]
        np.testing.assert_allclose(joined.reference.positions[on_the_way], motion(times), atol=2e-3)


def sampled(reference: Reference, times_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities between a reference's knots."""
    curve = CubicHermiteSpline(reference.seconds, reference.positions, reference.velocities)
    seconds = (times_ns - reference.times_ns[0]) / 1e9
    return curve(seconds), curve(seconds, 1)


def arc(times_ns: np.ndarray) -> np.ndarray:
    """A motion that cubics follow exactly, (times, joints)."""
    seconds = (np.asarray(times_ns) - START_NS)[:, None] / 1e9
    return 0.2 * seconds - 0.05 * seconds**2 + np.array([-0.1, 0.0, 0.1])


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    acceleration=st.sampled_from([np.inf, 20.0]),
    gap=arrays(np.float64, JOINTS, elements=st.floats(-0.05, 0.05)),
    again=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=25),
)
def test_a_chunk_that_agrees_changes_nothing_however_often_it_comes(
    mode: str, acceleration: float, gap: np.ndarray, again: list[tuple[int, int]]
) -> None:
    """Not even while the robot is on its way to the chunk: it goes on as it would have."""
    plan = schedule(acceleration, mode=mode)
    steps = np.arange(1, 101) * PERIOD_NS
    here = arc(np.array([START_NS]))[0]
    plan.add(arc(START_NS + steps) + gap, START_NS, START_NS, here + gap)
    now = START_NS + 300_000_000
    if mode == "ensemble":  # their mean is not to change
        plan.safe_stop(now)
        now += 300_000_000
    # Here another one takes over.
    plan.add(arc(now + steps), now, now, plan.reference.sample(now)[0])
    for after_ms, latency_ms in again:
        before = plan.reference
        now += after_ms * 1_000_000
        observed = now - latency_ms * 1_000_000
        plan.add(arc(observed + steps), observed, now, before.sample(now)[0])
        times = np.arange(now, now + 1_000_000_000, 7_000_000)
        for one, other in zip(sampled(before, times), sampled(plan.reference, times), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    acceleration=st.sampled_from([np.inf, 30.0]),
    latency_ms=st.integers(0, 300),
    every_ms=st.integers(10, 40),
    gap=arrays(np.float64, JOINTS, elements=st.floats(-0.1, 0.1)),
)
def test_an_expert_is_followed_however_often_it_plans(
    mode: str, acceleration: float, latency_ms: int, every_ms: int, gap: np.ndarray
) -> None:
    plan = schedule(acceleration, mode=mode, start_distance=0.5)
    observed, executed = START_NS, None
    while observed < START_NS + 1_200_000_000:
        now = observed + latency_ms * 1_000_000
        seconds = (observed - START_NS) / 1e9
        measured = expert(np.zeros(1))[0] + gap if executed is None else executed.sample(now)[0]
        plan.add(chunk_at(seconds), observed, now, measured)
        executed = plan.reference
        observed += every_ms * 1_000_000
    times = np.arange(now, now + 600_000_000, 10_000_000)
    np.testing.assert_allclose(sampled(executed, times)[0], expert((times - START_NS) / 1e9), atol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_of_one_step(mode: str) -> None:
    plan = schedule(acceleration=20.0, mode=mode)
    observed, here = START_NS, np.zeros(JOINTS)
    for number in range(100):
        wanted = np.full((1, JOINTS), 0.002 * min(number, 50))
        try:
            here = plan.add(wanted, observed, observed, here).reference.positions[0]
        except LateError:
            assert plan.settings.send_lead_time_s * 1e9 >= PERIOD_NS
        observed += PERIOD_NS
        here = here if plan.reference is None else plan.reference.sample(observed)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_safe_stop_ends_the_motion_to_a_chunk(mode: str) -> None:
    plan = schedule(acceleration=8.0, mode=mode)
    joined = plan.add(chunk_at(0.0), START_NS, START_NS, expert(np.zeros(1))[0])
    now = START_NS + 600_000_000
    joined = plan.add(chunk_at(0.6) + 0.05, now, now, plan.reference.sample(now)[0])
    now = joined.splice_ns + 3 * PERIOD_NS
    stop = plan.safe_stop(now)
    check(stop, limits(8.0))
    assert plan.safe_stop(now) is None
    np.testing.assert_array_equal(plan.reference.velocities[-1], 0.0)
    # And nothing of it is left for what follows after it.
    now = stop.end_ns + 10 * PERIOD_NS
    rest = np.tile(stop.positions[-1], (50, 1))
    resting = plan.add(rest, now, now, rest[0]).reference.positions
    np.testing.assert_allclose(resting, np.broadcast_to(rest[0], resting.shape), rtol=0, atol=1e-12)


def test_the_motion_to_a_far_chunk_continues_though_the_gap_grows_first() -> None:
    """The chunk moves away faster than the robot, which rests, can turn to it: that is no reason to refuse the next."""
    plan = schedule(acceleration=3.0, start_distance=0.3)
    observed, here = START_NS, np.full(JOINTS, -1.25)
    gaps = []
    for _ in range(90):
        times = observed - START_NS + np.arange(1, 51) * PERIOD_NS
        joined = plan.add(times[:, None] / 1e9 * np.ones(JOINTS) - 1, observed, observed, here)
        gaps.append(joined.position_gap.max())
        observed += PERIOD_NS
        here = plan.reference.sample(observed)[0]
    assert gaps[0] > 0.25
    assert gaps[-1] < 1e-3
    with pytest.raises(ClpError, match=r"the chunk begins 0\.380 from where the arm is, max_deviation allows 0\.3"):
        plan.add(np.tile(here + 0.4, (50, 1)), observed, observed, here)


def test_a_chunk_shorter_than_its_latency_is_late_and_the_robot_stops() -> None:
    plan = schedule()
    plan.add(chunk_at(0.0, steps=10), START_NS, START_NS, expert(np.zeros(1))[0])
    end = plan.reference
    for number in range(5):
        observed = START_NS + number * 300_000_000
        with pytest.raises(LateError):
            here = end.sample(observed + 300_000_000)[0]
            plan.add(chunk_at(number * 0.3, steps=10), observed, observed + 300_000_000, here)
    assert plan.reference is end


def test_the_first_moments_are_left_to_the_controllers_though_more_chunks_come() -> None:
    plan = schedule()
    joined = plan.add(chunk_at(0.0), START_NS, START_NS, expert(np.zeros(1))[0])
    first = int(joined.reference.times_ns[0])
    assert first >= START_NS + 200_000_000
    for now in range(START_NS + PERIOD_NS, first - 2 * PERIOD_NS, PERIOD_NS):
        here = plan.reference.sample(now)[0]
        assert plan.add(chunk_at((now - START_NS) / 1e9), now, now, here).reference.times_ns[0] >= first


def test_a_safe_stop_in_the_first_moments_leaves_them_to_the_controllers_too() -> None:
    for steps in (50, 5):  # the shorter chunk ends within them
        plan = schedule()
        first = plan.add(chunk_at(0.0, steps), START_NS, START_NS, expert(np.zeros(1))[0]).reference
        stop = plan.safe_stop(START_NS + 10_000_000)
        assert stop.times_ns[0] == first.times_ns[0] > START_NS + 90_000_000
        assert not stop.velocities[-1].any()
        assert np.abs(stop.positions - expert(np.zeros(1))[0]).max() < 0.1
        check(plan.reference, limits())


def test_a_robot_that_was_moved_while_it_rested_begins_anew() -> None:
    place = np.full(JOINTS, 0.1)
    plan = schedule()
    plan.add(np.tile(place, (50, 1)), START_NS, START_NS, place)
    # It holds something that kept it from going all the way, and is no robot that was moved.
    held = place + np.array([0.0, 0.0, 0.1])
    later = plan.reference.end_ns + 10**9
    plan.observe(held, later)
    joined = plan.add(np.tile(place, (50, 1)), later, later, held)
    assert joined.reference.times_ns[0] < later + 50_000_000
    np.testing.assert_allclose(joined.reference.positions[0], place)
    later = plan.reference.end_ns + 10**9
    plan.observe(held, later)
    later += 60 * 10**9
    # Less than start_distance, but the controllers' last command may be elsewhere.
    moved = place + np.array([0.0, 0.2, 0.0])
    joined = plan.add(np.tile(moved, (50, 1)), later, later, moved)
    assert joined.reference.times_ns[0] >= later + 200_000_000
    np.testing.assert_allclose(joined.reference.positions, np.tile(moved, (len(joined.reference.positions), 1)))
    # Drooping is no move: the reference continues from the commanded position.
    again = joined.reference.end_ns + 10**9
    plan.observe(moved - 0.02, again)
    joined = plan.add(np.tile(moved, (50, 1)), again, again, moved - 0.01)
    assert joined.reference.times_ns[0] < again + 50_000_000
    np.testing.assert_allclose(joined.reference.positions[0], moved)


def test_a_chunk_that_is_too_fast_is_followed_at_the_limits_or_refused() -> None:
    fast = np.linspace(0, 1.4, 20)[:, None] * np.ones(JOINTS)  # 3.7 rad/s
    still = np.zeros(JOINTS)
    joined = schedule(acceleration=20.0, velocity=1.0, start_distance=0.5).add(fast, START_NS, START_NS, still)
    _, positions, velocities = dense(joined.reference)
    assert 0.999 < np.abs(velocities).max() <= 1.0 + 1e-6
    assert 0.9 < joined.deviation.max() < 1.2
    assert positions[-1].max() < 1.4
    # Behind it by more than it goes in a second.
    longer = np.linspace(0, 1.4, 75)[:, None] * np.ones(JOINTS)
    schedule(velocity=0.6).add(longer, START_NS, START_NS, still)
    with pytest.raises(ClpError, match=r"inside its limits the arm is left 1\.\d* behind the chunk") as caught:
        schedule(velocity=0.1).add(longer, START_NS, START_NS, still)
    assert "joint_" in caught.value.where


def test_a_chunk_far_from_the_arm_is_refused_and_the_reference_stays() -> None:
    plan = schedule(start_distance=0.3)
    with pytest.raises(ClpError, match=r"begins 0\.5\d* from where the arm is.*") as caught:
        plan.add(np.full((10, JOINTS), 0.5), START_NS, START_NS, np.zeros(JOINTS))
    assert caught.value.where == "joint_0"
    assert plan.reference is None
    plan.add(np.zeros((50, JOINTS)), START_NS, START_NS, np.zeros(JOINTS))
    kept = plan.reference
    with pytest.raises(ClpError, match="from where it was sent"):  # it is held by something
        plan.add(np.zeros((50, JOINTS)), START_NS, START_NS + PERIOD_NS, np.array([0.0, 0.4, 0.0]))
    assert plan.reference is kept
    # At rest: somebody has moved it, and it goes on from there.
    later = kept.end_ns + 10**9
    joined = plan.add(np.full((50, JOINTS), 0.5), later, later, np.full(JOINTS, 0.5))
    np.testing.assert_allclose(joined.reference.positions, 0.5)


@pytest.mark.parametrize("wanted", [1.5, 1.3])
def test_a_robot_slightly_outside_its_limits_comes_back_inside_the_others(wanted: float) -> None:
    """By a controller that begins with one cubic from where the robot is."""
    plan, measured = schedule(acceleration=4.0), np.array([1.57, -1.56, 0.0])
    joined = plan.add(wanted * np.ones((100, JOINTS)) * [1, -1, 0], START_NS, START_NS, measured)
    after_s = (joined.reference.times_ns[0] - START_NS) / 1e9
    ends, speed = joined.reference.positions[0], joined.reference.velocities[0]
    cubic = CubicHermiteSpline([0.0, after_s], [measured, ends], [np.zeros(JOINTS), speed])
    times = np.linspace(0, after_s, 200)
    assert np.abs(cubic(times, 2)).max() <= 4.0
    assert np.abs(cubic(times, 1)).max() <= 2.0
    check(joined.reference, limits(4.0))


def test_a_robot_outside_its_limits_is_not_driven_by_a_chunk_too_short_to_come_back() -> None:
    with pytest.raises(ClpError, match="too short to come back slowly"):
        schedule(acceleration=0.5).add(np.full((10, JOINTS), 1.4), START_NS, START_NS, np.full(JOINTS, 1.6))


def test_of_two_chunks_of_one_observation_the_newest_is_the_last_to_count() -> None:
    """Its last step alone may be left: then it must count at all."""
    plan = schedule(mode="ensemble", send_lead_time_s=0.0)
    for wanted in (0.1, 0.12):
        plan.add(np.full((12, JOINTS), wanted), START_NS, START_NS, np.full(JOINTS, 0.1))
    assert (plan.reference.positions[-1] > 0.111).all()
    now = START_NS + 10 * PERIOD_NS + 1
    plan.add(np.full((12, JOINTS), 0.14), START_NS, now, plan.reference.sample(now)[0])
    assert (plan.reference.positions[-1] > 0.111).all()


def test_a_joint_that_brakes_very_slowly_is_led_no_faster_than_it_can_stop_soon() -> None:
    plan = schedule(acceleration=0.05)
    ramp = np.linspace(0.02, 1.0, 50)[:, None] * np.ones(JOINTS)
    plan.add(ramp, START_NS, START_NS, np.zeros(JOINTS))
    assert plan.reference.end_ns - START_NS < 7 * 10**9
    check(plan.reference, limits(0.05))


@pytest.mark.parametrize("bad", [1.7, -1.7, np.nan, np.inf])
def test_a_robot_outside_its_limits_is_not_driven(bad: float) -> None:
    plan = schedule()
    measured = np.array([0.0, 0.0, bad])
    with pytest.raises(ClpError, match=r"outside \[-1.5, 1.5\]") as caught:
        plan.add(np.zeros((50, JOINTS)), START_NS, START_NS, measured)
    assert caught.value.where == "joint_2"
    assert plan.reference is None
    plan.add(np.full((50, JOINTS), 1.4), START_NS, START_NS, np.full(JOINTS, 1.51))  # a little beyond


@pytest.mark.parametrize(
    "chunk",
    [np.full((5, JOINTS), np.nan), np.full((5, JOINTS), np.inf), np.zeros((0, JOINTS)), np.zeros((5, 2)), np.zeros(3)],
)
def test_what_is_no_chunk_is_refused(chunk: np.ndarray) -> None:
    plan = schedule()
    with pytest.raises(ClpError):
        plan.add(chunk, START_NS, START_NS, np.zeros(JOINTS))
    assert plan.reference is None


values = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(arrays(np.float64, st.tuples(st.integers(1, 12), st.just(JOINTS)), elements=values), max_size=6),
    delays=st.lists(st.integers(0, 400), min_size=6, max_size=6),
    mode=st.sampled_from(MODES),
    acceleration=st.sampled_from([np.inf, 20.0, 3.0]),
    hold_after=st.integers(0, 400),
    start=st.floats(-1.5, 1.5),
)
def test_nothing_unsafe_comes_out_whatever_goes_in(
    chunks: list, delays: list, mode: str, acceleration: float, hold_after: int, start: float
) -> None:
    bound = limits(acceleration)
    plan = ChunkSchedule(bound, PERIOD_NS, ScheduleSettings(mode=mode, start_distance=1.0))
    now, here = START_NS, np.full(JOINTS, start)
    previous = None
    for chunk, delay in zip(chunks, delays, strict=False):
        observed, now = now, now + delay * 1_000_000
        here = here if previous is None else previous.sample(now)[0]
        try:
            joined = plan.add(chunk, observed, now, here)
        except ClpError:
            assert plan.reference is previous
            continue
        sent = joined.reference
        assert sent.times_ns[0] > now
        assert (np.diff(sent.times_ns) > 0).all()
        check(sent, bound)
        _, positions, speeds = dense(plan.reference)
        assert np.abs(positions).max() <= 1.5 + 1e-5
        assert np.abs(speeds).max() <= 2.0 + 1e-5
        if previous is not None:
            np.testing.assert_array_equal(previous.sample(joined.splice_ns), plan.reference.sample(joined.splice_ns))
        begun, previous = sent.times_ns[0], plan.reference
    now += hold_after * 1_000_000
    stop = plan.safe_stop(now)
    if stop is not None:
        assert stop.times_ns[0] > now
        np.testing.assert_array_equal(stop.velocities[-1], 0.0)
        np.testing.assert_allclose(plan.reference.sample(now), previous.sample(now))
        if now >= begun:
            np.testing.assert_allclose(stop.sample(stop.times_ns[0]), previous.sample(stop.times_ns[0]))
        else:  # the controllers are on their way to what was sent first
            assert stop.times_ns[0] >= begun
        assert np.abs(dense(plan.reference)[1]).max() <= 1.5 + 1e-5
        seconds = (stop.end_ns - now) / 1e9
        slowest = min(acceleration, 2.0 / 0.25)
        first = max(0.04, (begun - now) / 1e9)
        # Two control steps more than at once: the acceleration of a spline is linear between its knots.
        assert seconds <= first + 2.0 / slowest + 0.06 + 1e-6


@pytest.mark.parametrize("mode", ["replace", "ensemble"])
def test_a_trained_policys_chunks_are_followed_at_full_speed(shared_data: Path, mode: str) -> None:
    """Each alone from where the robot was, and each run's in a row; wrist_3 asks for more than the joint can."""
    embodiment = load_embodiment("ur5")
    bound, period = Limits.of(embodiment), embodiment.period_ns
    with np.load(shared_data / "chunks" / "smolvla_ur5_series.npz") as series:
        runs, steps, states, chunks = (series[name] for name in ("run", "step", "state", "chunk"))
    for run in np.unique(runs):
        in_a_row = ChunkSchedule(bound, period, ScheduleSettings(mode=mode))
        for number in np.flatnonzero(runs == run):
            observed = START_NS + int(steps[number]) * period
            now = observed + 100_000_000
            alone = ChunkSchedule(bound, period, ScheduleSettings(mode=mode))
            alone.add(chunks[number], observed, observed, states[number])
            here = states[number] if in_a_row.reference is None else in_a_row.reference.sample(now)[0]
            joined = in_a_row.add(chunks[number], observed, now, here)
            for reference in (alone.reference, in_a_row.reference):
                check(reference, bound)
            # The joints that the policy moves at a robot's speed are as close as its noise and the splice allow.
            assert joined.deviation[[1, 4]].max() < 0.15


def test_a_plan_is_made_only_if_nothing_has_changed_since() -> None:
    plan = schedule()
    plan.add(chunk_at(0.0), START_NS, START_NS, expert(np.zeros(1))[0])
    now = START_NS + 500_000_000
    before, here = plan.reference, plan.reference.sample(now)[0]
    planned = plan.plan(chunk_at(0.5), now, now, here)
    assert plan.reference is before  # nothing has changed yet
    stop = plan.safe_stop(now)
    assert not plan.commit(planned)
    np.testing.assert_array_equal(plan.reference.positions[-1], stop.positions[-1])
    again = plan.plan(chunk_at(0.5), now, now, here)
    assert plan.commit(again)
    assert not plan.commit(again)


def test_the_allowed_deviation_is_a_share_of_the_range_with_a_floor_in_the_joints_unit() -> None:
    bound = Limits(
        ("wide", "narrow", "rail", "finger", "gripper"),
        np.array([-6.28, -1.0, 0.0, 0.0, 0.0]),
        np.array([6.28, 1.0, 2.0, 0.04, 0.8]),
        np.full(5, 2.0),
        np.full(5, np.inf),
        units=("rad", "rad", "m", "m", "normalised"),
    )
    np.testing.assert_allclose(bound.deviation(0.05), [0.628, 0.3, 0.1, 0.03, 0.8])
    np.testing.assert_allclose(bound.deviation(0.5), [6.28, 1.0, 1.0, 0.03, 0.8])
    # A gripper may be closed in one step; an arm that is far from its demonstrations is not driven.
    plan = ChunkSchedule(bound, PERIOD_NS, ScheduleSettings())
    closing = np.tile([0.0, 0.0, 0.0, 0.0, 0.8], (50, 1))
    joined = plan.add(closing, START_NS, START_NS, np.zeros(5))
    assert joined.reference.positions[-1, 4] == pytest.approx(0.8, abs=1e-3)
    for joint, far in (("wide", 0.7), ("narrow", 0.4), ("rail", 0.2), ("finger", 0.035)):
        chunk = np.tile(far * np.array([name == joint for name in bound.names]), (50, 1))
        with pytest.raises(ClpError, match=f"begins {far:.3f} from where the arm is") as caught:
            ChunkSchedule(bound, PERIOD_NS, ScheduleSettings()).add(chunk, START_NS, START_NS, np.zeros(5))
        assert caught.value.where == joint


@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    noise=st.sampled_from([0.001, 0.005, 0.05]),
    acceleration=st.sampled_from([5.0, 20.0]),
    latency_ms=st.integers(0, 300),
    every_ms=st.integers(10, 400),
    seed=st.integers(0, 10**6),
)
def test_a_noisy_policy_is_never_refused_and_the_limits_hold(
    mode: str, noise: float, acceleration: float, latency_ms: int, every_ms: int, seed: int
) -> None:
    bound = limits(acceleration)
    plan = schedule(acceleration, mode=mode)
    rng = np.random.default_rng(seed)
    observed, here = START_NS, expert(np.zeros(1))[0]
    while observed < START_NS + 1_500_000_000:
        now = observed + latency_ms * 1_000_000
        here = here if plan.reference is None else plan.reference.sample(now)[0]
        seconds = (observed - START_NS) / 1e9
        plan.add(chunk_at(seconds) + noise * rng.standard_normal((50, JOINTS)), observed, now, here)
        check(plan.reference, bound)
        observed += every_ms * 1_000_000
    times, positions, velocities = dense(plan.reference, points=20)
    assert np.abs(velocities).max() <= 2.0
    assert np.abs(positions).max() <= 1.5
    inside = (times > (now - START_NS) / 1e9) & (times < seconds + 0.8)
    if inside.any():
        assert np.sqrt(np.mean((positions[inside] - expert(times[inside])) ** 2)) < noise + 0.02


def test_check_refuses_what_a_controller_would_take() -> None:
    bound = limits(10.0)
    times = START_NS + np.arange(3, dtype=np.int64) * PERIOD_NS
    zeros = np.zeros((3, JOINTS))
    check(Reference(times, zeros, zeros), bound)

    def changed(array: np.ndarray, value: float, knot: int = 1) -> np.ndarray:
        array = array.copy()
        array[knot, 1] = value
        return array

    for positions, velocities, words in [
        (changed(zeros, np.nan), zeros, "not finite"),
        (zeros, changed(zeros, np.inf), "not finite"),
        (changed(zeros, 1.6), zeros, r"leaves \[-1.5, 1.5\]"),
        (zeros, changed(zeros, 0.1, knot=2), "at rest"),
        (changed(zeros, 0.1), zeros, "too fast"),
    ]:
        with pytest.raises(ClpError, match=words):
            check(Reference(times, positions, velocities), bound)
    # Inside at the knots, outside between them.
    edge = np.full((3, JOINTS), 1.5)
    with pytest.raises(ClpError, match="leaves"):
        check(Reference(times, edge, changed(zeros, 1.0)), limits())
    with pytest.raises(ValueError, match="increase"):
        Reference(times[::-1].copy(), zeros, zeros)
