# SPDX-License-Identifier: Apache-2.0
"""Simulated robots with the topics of the real ones, and recorded demonstrations of them."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
