# SPDX-License-Identifier: Apache-2.0
from .chunk_schedule import ChunkSchedule as ChunkSchedule
from .chunk_schedule import ScheduleSettings as ScheduleSettings
from .reference import Reference as Reference
from .safety import Limits as Limits
