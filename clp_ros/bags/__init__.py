# SPDX-License-Identifier: Apache-2.0
"""Reads and writes rosbag2 recordings."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
