# SPDX-License-Identifier: Apache-2.0
from .episodes import Frame as Frame
from .episodes import read_episode as read_episode
from .episodes import read_frames as read_frames
from .episodes import usable_ticks as usable_ticks
from .reservoir import FrameReservoir as FrameReservoir
