# SPDX-License-Identifier: Apache-2.0
"""The paper, a file a step: calibration, similarity, selection, surgery; and what a checkpoint costs."""
