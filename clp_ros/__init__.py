# SPDX-License-Identifier: Apache-2.0
"""CKA-guided layer pruning of vision-language-action policies, from a rosbag2 demonstration to a robot's topics."""

__version__ = "0.1.0"

from clp_ros.moved_modules import install as _install_moved_modules

_install_moved_modules()
