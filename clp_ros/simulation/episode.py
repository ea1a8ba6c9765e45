# SPDX-License-Identifier: Apache-2.0
"""One episode of a simulated task, without ROS: by the scripted expert, or by any policy of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clp_ros.simulation.perturbation import UNPERTURBED, Perturbation, Pushes
from clp_ros.simulation.servo import ArmServo
from clp_ros.simulation.task_simulation import Seed, TaskSimulation

# An episode goes on for this time after success, in seconds.
REST_S = 0.4
# Marks the random numbers of the pushes.
_PUSHES = 0xD15
# Largest part of the tool's measured deviation that the expert corrects, in metres.
_SAG_M = 0.04
# Time constant of that correction, in control steps.
_SAG_STEPS = 15.0


class EpisodePolicy(Protocol):
    """Drives a robot, one control step at a time."""

    def reset(self, simulation: TaskSimulation, seed: Seed) -> None:
        """Begins an episode. The simulation stands at its start."""

    def act(self, simulation: TaskSimulation) -> tuple[np.ndarray, np.ndarray]:
        """Returns the action, and the command that is executed: both (joints,) float64, rad or m.

        They differ where a demonstration is perturbed.
        """


class ExpertPolicy:
    """The scripted expert of the simulation's task.

    Args:
        simulation: The simulation.
        speed: Factor on the expert's speed.
        perturbation: Pushes off the way. The action is the expert's answer without the push.
    """

    def __init__(
        self, simulation: TaskSimulation, speed: float = 1.0, perturbation: Perturbation = UNPERTURBED
    ) -> None:
        self._perturbation = perturbation
        self._period_s = simulation.embodiment.period_ns / 1e9
        self._servos = {
            name: ArmServo(
                simulation.embodiment,
                arm,
                simulation.mujoco_model,
                *simulation.servo_addresses(arm.joints),
                speed=speed,
            )
            for name, arm in simulation.arms.items()
        }
        self._pushes: dict[str, Pushes] = {}
        self._sag: dict[str, np.ndarray] = {}

    def reset(self, simulation: TaskSimulation, seed: Seed) -> None:
        """See :class:`EpisodePolicy`."""
        numbers = [seed] if isinstance(seed, int | np.integer) else list(seed)
        for index, (name, servo) in enumerate(self._servos.items()):
            servo.reset()
            rng = np.random.default_rng([*(int(number) for number in numbers), index, _PUSHES])
            self._pushes[name] = Pushes(self._perturbation, rng, self._period_s)
            self._sag[name] = np.zeros(3)

    def act(self, simulation: TaskSimulation) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`EpisodePolicy`."""
        state = simulation.state()
        goals = simulation.task.goals(state)
        action = simulation.commanded_positions()
        executed = action.copy()
        for name, servo in self._servos.items():
            arm = servo.arm
            if name not in goals:
                continue
            own = slice(arm.first, arm.first + 7)
            command = action[own].copy()
            commanded, _ = servo.kinematics(command[:6])
            off = np.clip(state.arms[name].position - commanded, -_SAG_M, _SAG_M)
            self._sag[name] += (off - self._sag[name]) / _SAG_STEPS
            action[own] = executed[own] = servo.follow(command, goals[name], self._sag[name])
            push = self._pushes[name].step(float(state.arms[name].position[2]))
            if push.any():
                executed[arm.joints] += servo.joint_steps(push)
        return action, executed


@dataclass(frozen=True)
class Rollout:
    """What happened in an episode.

    Attributes:
        instruction: The instruction.
        states: (steps, joints) float64: measured positions before each control step, rad or m.
        actions: (steps, joints) float64: the policy's actions, rad or m.
        pictures: By camera of the embodiment: (pictures, height, width, 3) uint8.
        picture_steps: (pictures,) int64: the control step before which each picture was taken.
        success: Whether the task was solved.
        success_s: When it was, in seconds; None: never.
        seconds: Duration in seconds.
    """

    instruction: str
    states: np.ndarray
    actions: np.ndarray
    pictures: dict[str, np.ndarray]
    picture_steps: np.ndarray
    success: bool
    success_s: float | None
    seconds: float


def play_episode(
    simulation: TaskSimulation,
    policy: EpisodePolicy,
    seed: Seed,
    watch: Callable[[int], None] | None = None,
    time_limit_s: float | None = None,
    rest_s: float = REST_S,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Plays one episode, from a new start until some time after success or until the time limit.

    Args:
        simulation: The simulation. ``success_s`` and ``time_s`` tell the result.
        policy: Drives the robot.
        seed: The start, and all else that is random.
        watch: Called at the start, and after each step of the model, with the time since the start in nanoseconds.
        time_limit_s: Longest episode, in seconds; None: the task's.
        rest_s: Time after success, in seconds.

    Yields:
        Measured positions and action, both (joints,) float64, rad or m: before each control step is executed.
    """
    simulation.reset(seed)
    policy.reset(simulation, seed)
    if watch is not None:
        watch(0)
    limit = simulation.task.time_limit_s if time_limit_s is None else time_limit_s
    period_s = simulation.embodiment.period_ns / 1e9
    while True:
        end = limit if simulation.success_s is None else simulation.success_s + rest_s
        if simulation.time_s + period_s / 2 > min(end, limit + rest_s):
            return
        action, executed = policy.act(simulation)
        yield simulation.measured(), action
        simulation.act(executed, watch)


def run_episode(
    simulation: TaskSimulation,
    policy: EpisodePolicy,
    seed: Seed,
    *,
    size: tuple[int, int] | None = None,
    picture_every: int = 1,
    wording: int | None = None,
    time_limit_s: float | None = None,
    rest_s: float = REST_S,
) -> Rollout:
    """Plays one episode and returns its observations and actions.

    Args:
        simulation: The simulation.
        policy: Drives the robot.
        seed: The start, and all else that is random.
        size: Width and height of the pictures; None: no pictures.
        picture_every: Control steps from one picture of each camera to the next.
        wording: Number of the instruction's wording; None: the one that the seed draws.
        time_limit_s: Longest episode, in seconds; None: the task's.
        rest_s: Time after success, in seconds.
    """
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    steps: list[int] = []
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in simulation.embodiment.cameras}
    for measured, action in play_episode(simulation, policy, seed, None, time_limit_s, rest_s):
        if size is not None and len(states) % picture_every == 0:
            steps.append(len(states))
            for name, taken in pictures.items():
                taken.append(simulation.picture(name, size[1], size[0]))
        states.append(measured)
        actions.append(action)
    return Rollout(
        simulation.instruction(wording),
        np.array(states),
        np.array(actions),
        {name: np.array(taken) for name, taken in pictures.items()} if size is not None else {},
        np.array(steps, dtype=np.int64),
        simulation.success_s is not None,
        simulation.success_s,
        simulation.time_s,
    )
