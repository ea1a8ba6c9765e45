# SPDX-License-Identifier: Apache-2.0
"""Selects the units to remove from a checkpoint, and writes the checkpoint without them."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
