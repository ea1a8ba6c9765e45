# SPDX-License-Identifier: Apache-2.0
"""What everything rests on: errors, validated settings, output folders written whole or not at all, processes."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
