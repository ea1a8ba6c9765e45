# SPDX-License-Identifier: Apache-2.0
from .plan import GroupPlan as GroupPlan
from .plan import Plan as Plan
from .plan import default_plan as default_plan
from .plan import make_plan as make_plan
from .selection import CRITERIA as CRITERIA
from .selection import calibrated_threshold as calibrated_threshold
from .selection import select_layers as select_layers
from .surgery import SurgeryPlan as SurgeryPlan
from .surgery import plan_surgery as plan_surgery
from .surgery import prune_checkpoint as prune_checkpoint
