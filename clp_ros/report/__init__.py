# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: heatmaps, tables for the terminal, the calibration's HTML page."""
