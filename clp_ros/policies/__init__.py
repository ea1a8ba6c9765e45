# SPDX-License-Identifier: Apache-2.0
"""What a policy family is; reading a checkpoint of one and running it; a folder a family."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
