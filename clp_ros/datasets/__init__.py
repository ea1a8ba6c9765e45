# SPDX-License-Identifier: Apache-2.0
"""Episodes of bags: observations on control ticks with the following actions."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
