# SPDX-License-Identifier: Apache-2.0
"""CKA-guided layer pruning of vision-language-action policies, from a rosbag2 demonstration to a robot's topics.

The names in ``__init__.pyi`` are the public API; each is imported when it is first used. Every sub-package exports its
own in the same way.

Example:
    >>> import clp_ros
    >>> clp_ros.select_layers([0.2, 0.99, 0.98, 0.3], budget=2)
    (2, 3)
"""

import lazy_loader as _lazy

from clp_ros.moved_modules import install as _install_moved_modules

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__version__ = "0.1.0"

_install_moved_modules()
