# SPDX-License-Identifier: Apache-2.0
"""Similarity of a policy's layers, from its hidden states on demonstrations (paper section 3)."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
