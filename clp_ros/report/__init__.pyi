# SPDX-License-Identifier: Apache-2.0
from .calibration_report import write_calibration as write_calibration
from .heatmaps import draw_heatmap as draw_heatmap
