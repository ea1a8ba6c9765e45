# SPDX-License-Identifier: Apache-2.0
"""Heatmaps, tables for the terminal, and the calibration's HTML page."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
