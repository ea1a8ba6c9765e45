# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder: Hub cache, safetensors headers, tensor names, manifest."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
