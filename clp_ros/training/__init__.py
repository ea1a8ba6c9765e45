# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning through lerobot: which weights train, the run, and the resulting checkpoint; task heads."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
