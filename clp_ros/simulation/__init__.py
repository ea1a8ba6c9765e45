# SPDX-License-Identifier: Apache-2.0
"""A simulated robot behind the same topics as the real one, and demonstrations that it plays."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
