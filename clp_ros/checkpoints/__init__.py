# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: where it lies, headers, tensor names, manifest."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
