# SPDX-License-Identifier: Apache-2.0
"""A scripted expert's chunks, late, through the node's own schedule to simulated robots: its task gets done."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from clp_ros.control.chunk_schedule import MODES, ScheduleSettings
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.simulation.closed_loop import START_NS, Controllers, Expert, Run, ScheduledSender, play
from clp_ros.simulation.motion import Motion, Part, through

STEPS = 50
LATENCIES_MS = [0, 50, 150, 300]


def run(robot, motion, mode: str, latency_ms: int, replan_steps: int, step_ns: int) -> tuple[Run, ScheduledSender]:
    sender = ScheduledSender(robot, ScheduleSettings(mode=mode), replan_steps=replan_steps, latency_s=latency_ms / 1e3)
    expert = Expert(motion, robot.embodiment, STEPS)
    return play(robot, expert, sender, lambda: latency_ms * 1_000_000, step_ns, 2 * motion.seconds), sender


@pytest.mark.parametrize("replan_steps", [40, 0])
@pytest.mark.parametrize("latency_ms", LATENCIES_MS)
@pytest.mark.parametrize("mode", MODES)
def test_waypoints_are_reached_without_a_jump(mode: str, latency_ms: int, replan_steps: int) -> None:
    name, seed = ("aloha_bimanual", 0) if latency_ms in (0, 300) else ("ur5", 1)
    embodiment = load_embodiment(name)
    rng = np.random.default_rng(seed)
    lower, upper = (np.array([getattr(joint, side) for joint in embodiment.joints]) for side in ("lower", "upper"))
    middle, reach = (lower + upper) / 2, np.minimum((upper - lower) / 2, 0.5)
    waypoints = middle + reach * rng.uniform(-1, 1, (4, embodiment.action_size))
    motion = through(embodiment, waypoints)
    result, sender = run(Controllers(embodiment, waypoints[0]), motion, mode, latency_ms, replan_steps, 4_000_000)
    position, velocity = result.jumps()
    assert position < 1e-3
    assert velocity < 0.05
    assert not sender.counts["late"] + sender.counts["refused"]
    assert len(sender.splices) > 3
    assert result.finished_s < motion.seconds + 0.1
    assert result.tracking_rms() < 0.02
    np.testing.assert_allclose(result.positions[-1], waypoints[-1], atol=1e-3)
    for seam in waypoints[1:-1]:  # each on the way, too
        assert np.abs(result.positions - seam).max(axis=1).min() < 0.03


class Noisy(Expert):
    """An expert as a trained policy is: 1 mrad of white noise a step."""

    rng = np.random.default_rng(0)

    def chunk(self, positions, now_ns):
        chunk = super().chunk(positions, now_ns)
        return chunk + self.rng.normal(scale=1e-3, size=chunk.shape)


@pytest.mark.parametrize("from_desired", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_new_message_makes_no_step_whatever_the_controllers_begin_with(mode: str, from_desired: bool) -> None:
    embodiment = load_embodiment("ur5")
    waypoints = np.array([[0.3] * 7, [-0.3] * 6 + [0.6], [0.4] * 7])
    motion = through(embodiment, waypoints)

    def driven(crops: bool) -> tuple[Run, ScheduledSender]:
        robot = Controllers(
            embodiment,
            waypoints[0],
            interpolate_from_desired_state=from_desired,
            lag_s=0.04,
            noise=1e-4,
            transport_s=0.015,
        )
        receive = robot.receive

        def cropped(trajectory, now_ns):
            ahead = trajectory.start_ns + trajectory.times * 1e9 > now_ns
            parts = {key: getattr(trajectory, key)[ahead] for key in ("times", "positions", "velocities")}
            receive(dataclasses.replace(trajectory, **parts), now_ns)

        robot.receive = cropped if crops else receive
        settings = ScheduleSettings(mode=mode)
        sender = ScheduledSender(robot, settings, replan_steps=0, latency_s=0.1)
        expert = Noisy(motion, embodiment, STEPS)
        return play(robot, expert, sender, lambda: 90_000_000, 2_000_000, 2 * motion.seconds), sender

    result, sender = driven(crops=False)
    position, velocity = result.jumps()
    assert position < 1e-3
    assert velocity < 0.05
    assert not sender.counts["late"] + sender.counts["refused"]
    assert sender.counts["chunks"] > 15
    assert result.finished_s < motion.seconds + 0.2
    if mode == "replace":  # without the points that have passed, the parameter matters
        assert (driven(crops=True)[0].jumps()[0] > 5e-3) == (not from_desired)


@pytest.mark.parametrize("from_desired", [True, False])
@pytest.mark.parametrize("scaled", [["arm"], []])
def test_a_robot_at_half_its_speed_and_paused_follows_without_a_step(scaled: list[str], from_desired: bool) -> None:
    embodiment = load_embodiment("ur5")
    speed = embodiment.speed_scaling.model_copy(update={"controllers": scaled})
    embodiment = embodiment.model_copy(update={"speed_scaling": speed})
    waypoints = np.array([[0.3] * 7, [-0.3] * 6 + [0.6], [0.4] * 7])
    motion = through(embodiment, waypoints)
    half = motion.seconds / 2

    def scaling(time_ns: int) -> float:
        # It changes with a control step, when this sender is told: on a real robot it is published at 100 to 500 Hz.
        seconds = (time_ns - START_NS) // embodiment.period_ns * embodiment.period_ns / 1e9
        return 1.0 if seconds < 0.2 * half else 0.0 if half < seconds < half + 0.4 else 0.5

    robot = Controllers(
        embodiment, waypoints[0], interpolate_from_desired_state=from_desired, lag_s=0.04, scaling=scaling
    )
    sender = ScheduledSender(robot, ScheduleSettings(), replan_steps=10, latency_s=0.1)
    result = play(robot, Expert(motion, embodiment, STEPS), sender, lambda: 90_000_000, 2_000_000, 4 * motion.seconds)
    assert not sender.counts["late"] + sender.counts["refused"]
    position, _ = result.jumps()
    # A controller that knows of the scaling changes its speed at once; another one is told within a control step.
    assert position < 1.5e-3
    seconds = (result.times_ns - START_NS) / 1e9
    moved = np.abs(np.diff(result.positions[(seconds > half + 0.05) & (seconds < half + 0.4)], axis=0)).sum(axis=0)
    assert moved.max() < 5e-3  # it stands still
    # All the rest takes twice as long, and no longer.
    assert 1.6 * motion.seconds < result.finished_s < 2 * motion.seconds + 0.4
    np.testing.assert_allclose(result.positions[-1], waypoints[-1], atol=2e-3)
    for waypoint in waypoints:
        assert np.abs(result.positions - waypoint).max(axis=1).min() < 0.03


@pytest.mark.parametrize("latency_ms", [50, 300])
@pytest.mark.parametrize("mode", ["replace", "ensemble"])
def test_a_policy_that_is_too_fast_for_the_robot_gets_there(mode: str, latency_ms: int) -> None:
    embodiment = load_embodiment("ur5")
    waypoints = np.array([[0.3] * 7, [-0.3] * 6 + [0.6], [0.4] * 7])
    (usual,) = through(embodiment, waypoints).parts
    motion = Motion((Part(usual.moments / 2, usual.positions),))
    sender = ScheduledSender(
        robot := Controllers(embodiment, waypoints[0]), ScheduleSettings(mode=mode), replan_steps=0, latency_s=0.3
    )
    result = play(robot, Expert(motion, embodiment, STEPS), sender, lambda: latency_ms * 1_000_000, 4_000_000, 20.0)
    assert not sender.counts["late"] + sender.counts["refused"]
    assert result.finished_s < 4 * motion.seconds
    position, velocity = result.jumps()
    assert position < 1e-3
    assert velocity < 0.05
    for waypoint in waypoints:
        assert np.abs(result.positions - waypoint).max(axis=1).min() < 0.05


# To this expert, which always goes on as it did, rtc is as replace: here the one plans every 40 steps, the other at
# once.
@pytest.mark.parametrize(("mode", "replan_steps"), [("replace", 0), ("ensemble", 0), ("rtc", 40)])
@pytest.mark.parametrize(
    ("name", "latency_ms"), [("ur5", 0), ("aloha_bimanual", 50), ("ur5", 150), ("aloha_bimanual", 300)]
)
def test_the_task_gets_done(name: str, latency_ms: int, mode: str, replan_steps: int) -> None:
    if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
        pytest.skip("the simulation's packages are in requirements-simulation.txt")
    from clp_ros.simulation.experts import demonstration, solved
    from clp_ros.simulation.robot import SimulatedRobot

    robot = SimulatedRobot(load_embodiment(name), seed=latency_ms)
    motion = demonstration(robot)
    assert not solved(robot)
    result, sender = run(robot, motion, mode, latency_ms, replan_steps, robot.step_ns)
    position, velocity = result.jumps()
    assert position < 1e-3
    assert velocity < 0.05
    assert not sender.counts["refused"] + sender.counts["late"]
    assert result.finished_s < motion.seconds + 0.2
    assert solved(robot)


def test_the_same_run_gives_the_same_numbers() -> None:
    embodiment = load_embodiment("ur10e")
    waypoints = np.array([[0.0] * 7, [0.5] * 7])
    motion = through(embodiment, waypoints)
    first, again = (run(Controllers(embodiment, waypoints[0]), motion, "ensemble", 50, 10, 4_000_000)[0] for _ in "ab")
    np.testing.assert_array_equal(first.positions, again.positions)
    assert first.times_ns[0] == START_NS
