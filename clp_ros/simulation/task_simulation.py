# SPDX-License-Identifier: Apache-2.0
"""A simulated robot with a task: starts by seed, one control step at a time, and the success test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation.arms import arms_of
from clp_ros.simulation.model import load_model
from clp_ros.simulation.robot import SimulatedRobot
from clp_ros.simulation.scene import Furniture, Layout
from clp_ros.simulation.task import ArmState, ObjectState, SimulatedTask, TaskState

# Largest random offset of the arm's initial pose, in rad.
SPREAD = 0.1
# Marks the random numbers of a start, so that they are not those of another use of the same seed.
_START = 0xC1B
# The success test is made this often, in nanoseconds.
_JUDGE_NS = 20_000_000

Seed = int | Sequence[int]


class TaskSimulation(SimulatedRobot):
    """A robot, its table and a task. Not thread-safe.

    It is driven in one of two ways: by :meth:`act`, one control step at a time, or by trajectories, as any
    :class:`clp_ros.simulation.closed_loop.Robot`.

    Args:
        embodiment: A robot that clp_ros ships. Topics and tf_prefix may differ.
        task: The task.
        seed: Seed of the first start.

    Attributes:
        layout: Where the objects began.
        arms: The robot's arms, by name.
        time_s: Time since the start, in seconds.
        success_s: When the success test had held long enough, in seconds since the start; None: not yet.

    Raises:
        ClpError: The robot cannot do the task, or a package is missing.
    """

    layout: Layout
    success_s: float | None

    def __init__(self, embodiment: Embodiment, task: SimulatedTask, seed: Seed = 0) -> None:
        if embodiment.name not in task.robots:
            raise ClpError(f"{embodiment.name} cannot do the simulated task {task.name!r}")
        self._task, self._scene = task, task.scene(embodiment.name)
        model = load_model(embodiment, self._scene.furnish)
        self._furniture = Furniture(self._scene, model.mujoco, model.cube)
        self.arms = arms_of(embodiment)
        self._sites = {name: model.mujoco.site(arm.site).id for name, arm in self.arms.items()}
        self._fingers = {
            model.mujoco.geom(finger).id: (name, finger) for name, arm in self.arms.items() for finger in arm.fingers
        }
        self._owners = {body: name for name, body in self._furniture.bodies.items()}
        self._mocap_bodies = {name: model.mujoco.body(name).id for name in self._furniture.mocap}
        super().__init__(embodiment, 0, model)
        self.reset(seed)

    # ------------------------------------------------------------------------------------------------ the task

    @property
    def task(self) -> SimulatedTask:
        """The task. It may be replaced by another one of the same scene; the start stays as it is."""
        return self._task

    @task.setter
    def task(self, task: SimulatedTask) -> None:
        if self.embodiment.name not in task.robots or task.scene(self.embodiment.name) != self._scene:
            raise ClpError(f"the task {task.name!r} has another scene than {self._task.name!r}")
        self._task = task
        self._held_ns = 0
        self.success_s = None

    def instruction(self, wording: int | None = None) -> str:
        """Returns the instruction of this start.

        Args:
            wording: Number of the task's wording; None: the one that the seed draws.
        """
        if wording is None:
            wording = int(self._wording * len(self._task.wordings))
        return self._task.instruction(self.layout, wording)

    def reset(self, seed: Seed, spread: float = SPREAD) -> None:
        """Draws a start: layout, colours and the arms' initial pose. The same for every task of the scene.

        Args:
            seed: The seed, or several numbers.
            spread: Largest random offset of the arms' joints, in rad.
        """
        numbers = [seed] if isinstance(seed, int | np.integer) else list(seed)
        rng = np.random.default_rng([*(int(number) for number in numbers), _START])
        away = spread * rng.uniform(-1.0, 1.0, len(self._model.home)) * self._turns
        self.layout = self._scene.draw(rng)
        self._wording = rng.random()
        self._rest_at(np.clip(self._model.home + away, self._lower, self._upper))
        self._furniture.place(self.data, self.layout)
        self._mujoco.mj_forward(self._model.mujoco, self.data)
        self._command = self._home.copy()
        self._judged_ns: int | None = None
        self._steps, self._held_ns = 0, 0
        self.success_s = None

    # ------------------------------------------------------------------------------------------------ moving

    @property
    def time_s(self) -> float:
        """Time since the start, in seconds."""
        return self._steps * self.step_ns / 1e9

    def act(self, positions: np.ndarray, watch: Callable[[int], None] | None = None) -> None:
        """Simulates one control step. The command moves in a straight line, as a controller of positions moves it.

        Args:
            positions: (joints,) the command at the end of the step, rad or m. Clipped to the joints' limits.
            watch: Called after each step of the model with the time since the start, in nanoseconds.
        """
        wanted = np.clip(np.asarray(positions, dtype=np.float64), self._lower, self._upper)
        steps = round(self.embodiment.period_ns / self.step_ns)
        first, move = self._command, (wanted - self._command) / steps
        for step in range(1, steps + 1):
            self.data.ctrl[self._actuator] = (first + step * move)[self._joint] * self._gain
            self._mujoco.mj_step(self._model.mujoco, self.data)
            self._steps += 1
            if watch is not None:
                watch(self._steps * self.step_ns)
        self._command = wanted
        self._judge(steps * self.step_ns)

    def step(self, time_ns: int) -> None:
        """See :class:`clp_ros.simulation.closed_loop.Robot`."""
        before = self._time_ns
        super().step(time_ns)
        if before is not None and self._time_ns is not None:
            self._steps += max(0, self._time_ns - before) // self.step_ns
        if self._judged_ns is None or time_ns < self._judged_ns:
            self._judged_ns = time_ns
        elif time_ns - self._judged_ns >= _JUDGE_NS:
            self._judge(time_ns - self._judged_ns)
            self._judged_ns = time_ns

    def _judge(self, passed_ns: int) -> None:
        """Makes the success test, after some time since the last one."""
        self._held_ns = self._held_ns + passed_ns if self._task.success(self.state()) else 0
        if self.success_s is None and self._held_ns >= self._task.hold_s * 1e9:
            self.success_s = self.time_s

    # ------------------------------------------------------------------------------------------------ the state

    def state(self) -> TaskState:
        """Returns the simulated state."""
        data, touching = self.data, self._touching()
        objects = {}
        for name, body in self._furniture.bodies.items():
            if name in self.layout:
                velocity = self._furniture.qvel[name]
                fingers = touching.get(name, set())
                held = [arm for arm, _ in fingers if all((arm, one) in fingers for one in self.arms[arm].fingers)]
                objects[name] = ObjectState(
                    data.xpos[body].copy(),
                    data.xmat[body].reshape(3, 3).copy(),
                    data.qvel[velocity : velocity + 3].copy(),
                    frozenset(arm for arm, _ in fingers),
                    frozenset(held),
                )
        for name, body in self._mocap_bodies.items():
            if name in self.layout:
                objects[name] = ObjectState(data.xpos[body].copy(), data.xmat[body].reshape(3, 3).copy(), np.zeros(3))
        return TaskState(objects, self._arm_states(), self.layout)

    def _arm_states(self) -> dict[str, ArmState]:
        measured, commanded = self.measured(), self.commanded_positions()
        return {
            name: ArmState(
                arm,
                self.data.site_xpos[self._sites[name]].copy(),
                self.data.site_xmat[self._sites[name]].reshape(3, 3).copy(),
                float(measured[arm.gripper]),
                float(commanded[arm.gripper]),
            )
            for name, arm in self.arms.items()
        }

    def commanded_positions(self) -> np.ndarray:
        """Returns what all joints were commanded last, by :meth:`act` or by trajectories: (joints,) rad or m."""
        return self._command.copy() if self._time_ns is None else self.commanded().positions

    def _touching(self) -> dict[str, set[tuple[str, str]]]:
        """Returns arm and finger of each contact, by object."""
        found: dict[str, set[tuple[str, str]]] = {}
        bodies = self._model.mujoco.geom_bodyid
        for one, other in self.data.contact.geom.tolist():
            for finger, geom in ((one, other), (other, one)):
                if finger in self._fingers and (name := self._owners.get(int(bodies[geom]))) is not None:
                    found.setdefault(name, set()).add(self._fingers[finger])
        return found

    def servo_addresses(self, joints: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of some joints in MuJoCo's ``qpos`` and ``qvel``."""
        places = np.searchsorted(self._joint, np.arange(len(self.embodiment.joints))[joints])
        return self._position[places], self._velocity[places]
