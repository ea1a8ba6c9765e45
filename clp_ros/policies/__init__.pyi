# SPDX-License-Identifier: Apache-2.0
from .base import HiddenStates as HiddenStates
from .base import Modality as Modality
from .base import Policy as Policy
from .checkpoint import Checkpoint as Checkpoint
from .family import Family as Family
from .features import PolicyFeatures as PolicyFeatures
from .lerobot_policy import LeRobotPolicy as LeRobotPolicy
from .lerobot_policy import LoadedPolicy as LoadedPolicy
from .loading import load_policy as load_policy
from .registry import families as families
from .registry import family_named as family_named
from .registry import family_of as family_of
from .statistics import Statistics as Statistics
from .statistics import compute_statistics as compute_statistics
from .statistics import read_dataset_statistics as read_dataset_statistics
