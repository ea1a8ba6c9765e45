# SPDX-License-Identifier: Apache-2.0
"""Episodes of a bag: observations on control ticks, each with the actions that followed."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
