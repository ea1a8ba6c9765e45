# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a policy on demonstrations, and how alike its layers are (paper section 3)."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
