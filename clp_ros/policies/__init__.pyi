# SPDX-License-Identifier: Apache-2.0
from .checkpoint import Checkpoint as Checkpoint
from .family import Family as Family
from .family import families as families
from .family import family_named as family_named
from .family import family_of as family_of
from .features import PolicyFeatures as PolicyFeatures
from .lerobot_policy import LoadedPolicy as LoadedPolicy
from .lerobot_policy import load_policy as load_policy
from .statistics import Statistics as Statistics
from .statistics import compute_statistics as compute_statistics
from .statistics import read_dataset_statistics as read_dataset_statistics
