# SPDX-License-Identifier: Apache-2.0
from .embodiment import Camera as Camera
from .embodiment import Controller as Controller
from .embodiment import Embodiment as Embodiment
from .embodiment import Joint as Joint
from .embodiment import JointStates as JointStates
from .embodiment import Sync as Sync
from .embodiment import load_embodiment as load_embodiment
from .observation import Observation as Observation
from .observation import ObservationBuffer as ObservationBuffer
from .task import Task as Task
from .task import load_task as load_task
from .trajectory import Trajectory as Trajectory
from .trajectory import chunk_positions as chunk_positions
from .trajectory import split_trajectory as split_trajectory
from .urdf_limits import JointLimits as JointLimits
from .urdf_limits import read_limits as read_limits
