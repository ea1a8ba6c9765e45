# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs and whether it loads: parameters, FLOPs, latency, memory."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
