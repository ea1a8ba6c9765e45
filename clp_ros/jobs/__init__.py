# SPDX-License-Identifier: Apache-2.0
"""The jobs, one file each, called by the command line, the nodes and the demo."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
