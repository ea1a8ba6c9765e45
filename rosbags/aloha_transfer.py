# SPDX-License-Identifier: Apache-2.0
"""gym-aloha's cube transfer in MuJoCo, with a motion that solves it, for record_aloha_bimanual.py.

gym-aloha has the scene, the controllers and the reward, but no motion. The motion here is scripted: inverse kinematics
computes the joints of some tool poses, which are joined by minimum-jerk segments. gym-aloha's position controllers
follow it.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.simulation.experts import Waypoint, transfer_motion

if TYPE_CHECKING:
    from dm_control.mujoco import Physics

SECOND = 1_000_000_000  # all times are in nanoseconds

ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINT_NAMES = (*ARM_JOINTS, "gripper", "left_finger", "right_finger")  # as Interbotix publishes them
# Offset in the simulator's qpos and qvel: six joints and two fingers of each arm, then the cube.
ARM_OFFSETS = {"left": 0, "right": 8}
FINGER_RANGE = (0.021, 0.057)  # m, closed and open: the limits in ALOHA's description and of the simulated joint
GRIPPER_RANGE = (0.6197, 1.6214)  # rad, closed and open, of ALOHA's follower


def solve(physics: "Physics", side: str, waypoints: list[Waypoint]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the joints at an arm's waypoints, each from those at the waypoint before, so that the posture stays.

    Returns:
        Moments, (waypoints,), and gym-aloha's actions of this arm, (waypoints, 7): six joints in rad, and the gripper
        from 0 to 1.

    Raises:
        RuntimeError: The arm does not reach a waypoint within its joints' limits.
    """
    from dm_control.utils.inverse_kinematics import qpos_from_site_pose
    from scipy.spatial.transform import Rotation

    scratch = physics.copy(share_model=True)
    joints = [f"vx300s_{side}/{name}" for name in ARM_JOINTS]
    arm = slice(ARM_OFFSETS[side], ARM_OFFSETS[side] + len(ARM_JOINTS))
    start = physics.data.qpos[arm].copy()
    actions = []
    for waypoint in waypoints:
        positions = start
        if waypoint.position is not None:
            result = qpos_from_site_pose(
                scratch,
                f"cali_{side}_site1",
                target_pos=waypoint.position,
                target_quat=Rotation.from_euler("ZYX", waypoint.angles).as_quat(scalar_first=True),
                joint_names=joints,
                tol=1e-9,
                max_steps=500,
            )
            positions = result.qpos[arm]
            limits = np.array([physics.named.model.jnt_range[joint] for joint in joints])
            if not result.success or (positions < limits[:, 0]).any() or (positions > limits[:, 1]).any():
                raise RuntimeError(f"the {side} arm does not reach {waypoint.position} at moment {waypoint.moment}")
        scratch.data.qpos[arm] = positions
        scratch.forward()
        actions.append([*positions, waypoint.gripper])
    return np.array([waypoint.moment for waypoint in waypoints]), np.array(actions)


def interpolate(moments: np.ndarray, actions: np.ndarray, moment: float) -> np.ndarray:
    """Returns the action at a moment, on a minimum-jerk profile between two waypoints, with rest at each waypoint."""
    following = int(np.clip(np.searchsorted(moments, moment, side="right"), 1, len(moments) - 1))
    share = (moment - moments[following - 1]) / (moments[following] - moments[following - 1])
    blend = share**3 * (10 - 15 * share + 6 * share**2)
    return (1 - blend) * actions[following - 1] + blend * actions[following]


class Scene:
    """gym-aloha's cube transfer: its MuJoCo model, controllers and reward.

    gym-aloha's Env is not used, because each of its steps renders three 640x480 images of other cameras.

    Args:
        seed: Seed of the cube's position on the table.

    Raises:
        ClpError: gym-aloha is missing, or rendering fails on this machine.
    """

    def __init__(self, seed: int) -> None:
        os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            import dm_control.mujoco
            import mujoco
        except ModuleNotFoundError as error:
            raise _missing(error) from error
        # dm_control loads the rendering library when it is imported. Without it, PyOpenGL raises any of these.
        except (ImportError, AttributeError, RuntimeError) as error:
            raise _cannot_draw(error) from error
        try:
            from gym_aloha.constants import ASSETS_DIR
            from gym_aloha.tasks import sim
            from gym_aloha.utils import sample_box_pose
        except ModuleNotFoundError as error:
            raise _missing(error) from error

        sim.BOX_POSE[0] = sample_box_pose(seed)  # as gym-aloha's Env places the cube
        self.physics = dm_control.mujoco.Physics.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
        self.task = sim.TransferCubeTask(random=seed)
        self.task.initialize_episode(self.physics)
        self.step_ns = round(self.physics.timestep() * SECOND)
        # gym-aloha drops the cube from a height of 5 cm. The motion expects it at rest on the table.
        half_edge = self.physics.named.model.geom_size["red_box"][2]
        motion = transfer_motion(np.array([*sim.BOX_POSE[0][:2], half_edge]))
        self.paths = [solve(self.physics, side, motion[side]) for side in ("left", "right")]
        try:
            self.picture("top", 16, 16)  # raises now if rendering fails, not after a minute
        except (RuntimeError, AttributeError, mujoco.FatalError) as error:
            raise _cannot_draw(error) from error

    def steps(self, seconds: float) -> int:
        """Returns the number of physics steps in some seconds."""
        return round(seconds * SECOND / self.step_ns)

    def run(self, steps: int) -> Iterator[int]:
        """Plays the motion in this number of physics steps. Yields the simulation time before each, in nanoseconds."""
        for step in range(steps):
            # The action changes at every physics step, like the command of a controller that interpolates. With
            # gym-aloha's period of 20 ms, the joints would jerk, and velocities would not match positions.
            action = np.concatenate([interpolate(*path, step / steps) for path in self.paths])
            self.task.before_step(action, self.physics)
            yield step * self.step_ns
            self.physics.step()

    def arm(self, side: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns positions and velocities of an arm's nine joints, in the units and ranges of ALOHA's follower."""
        offset = ARM_OFFSETS[side]
        joints, fingers = slice(offset, offset + 6), slice(offset + 6, offset + 8)
        position, velocity = self.physics.data.qpos, self.physics.data.qvel
        # The simulated fingers move independently, but a gear couples the real ones. So the mean opening is recorded.
        opening, opening_speed = (np.mean(values[fingers] * [1, -1]) for values in (position, velocity))
        opening = np.clip(opening, *FINGER_RANGE)  # MuJoCo's joint limits are soft
        to_gripper = (GRIPPER_RANGE[1] - GRIPPER_RANGE[0]) / (FINGER_RANGE[1] - FINGER_RANGE[0])
        gripper = GRIPPER_RANGE[0] + (opening - FINGER_RANGE[0]) * to_gripper
        return (
            np.array([*position[joints], gripper, opening, -opening]),
            np.array([*velocity[joints], opening_speed * to_gripper, opening_speed, -opening_speed]),
        )

    def picture(self, camera: str, width: int, height: int) -> np.ndarray:
        """Returns an image of one of the scene's cameras: (height, width, 3) uint8 RGB."""
        return self.physics.render(height=height, width=width, camera_id=camera)

    def handed_over(self) -> bool:
        """Returns whether the left gripper holds the cube above the table, and the right one does not touch it."""
        physics = self.physics
        contacts = {
            frozenset((physics.model.id2name(pair.geom1, "geom"), physics.model.id2name(pair.geom2, "geom")))
            for pair in physics.data.contact
        }
        held_by_right = any(
            "red_box" in pair and any(name.startswith("vx300s_right/") for name in pair) for pair in contacts
        )
        return self.task.get_reward(physics) == self.task.max_reward and not held_by_right


def _missing(error: ModuleNotFoundError) -> ClpError:
    return ClpError("a package is missing", where=error.name, hint="pip install -r requirements-simulation.txt")


def _cannot_draw(error: Exception) -> ClpError:
    return ClpError(
        f"MuJoCo cannot draw here ({' '.join(str(error).split())})",
        where=f"MUJOCO_GL={os.environ['MUJOCO_GL']}",
        hint="install EGL (Debian: apt-get install libegl1 libgl1-mesa-dri), or set MUJOCO_GL to glfw or osmesa",
    )
