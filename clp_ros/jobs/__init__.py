# SPDX-License-Identifier: Apache-2.0
"""One file a job: what the command line, the nodes and the demo call."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
