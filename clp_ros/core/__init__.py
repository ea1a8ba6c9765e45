# SPDX-License-Identifier: Apache-2.0
"""Errors, validated settings, atomic output folders and processes, used by all other rooms."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
