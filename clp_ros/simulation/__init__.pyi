# SPDX-License-Identifier: Apache-2.0
from .recording import RecordingSettings as RecordingSettings
from .recording import record as record
from .robot import SimulatedRobot as SimulatedRobot
