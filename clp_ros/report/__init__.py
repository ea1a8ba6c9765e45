# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: heatmaps, tables for the terminal, the calibration's HTML page."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
