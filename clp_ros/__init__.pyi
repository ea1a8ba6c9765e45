# SPDX-License-Identifier: Apache-2.0
from .bags.reader import open_bag as open_bag
from .calibration.calibrate import calibrate_bags as calibrate_bags
from .calibration.calibration_file import Calibration as Calibration
from .calibration.distances import AdjacentDistances as AdjacentDistances
from .calibration.similarity import LinearCKA as LinearCKA
from .control.chunk_schedule import ChunkSchedule as ChunkSchedule
from .core.errors import ClpError as ClpError
from .policies.base import Policy as Policy
from .policies.checkpoint import Checkpoint as Checkpoint
from .policies.lerobot_policy import LeRobotPolicy as LeRobotPolicy
from .policies.lerobot_policy import LoadedPolicy as LoadedPolicy
from .policies.loading import load_policy as load_policy
from .pruning.plan import Plan as Plan
from .pruning.plan import default_plan as default_plan
from .pruning.plan import make_plan as make_plan
from .pruning.selection import select_layers as select_layers
from .pruning.surgery import prune_checkpoint as prune_checkpoint
from .robots.embodiment import Embodiment as Embodiment
from .robots.embodiment import load_embodiment as load_embodiment
from .robots.task import Task as Task
from .robots.task import load_task as load_task

__version__: str
