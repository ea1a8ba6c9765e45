# SPDX-License-Identifier: Apache-2.0
"""From observations to trajectories, chunk by chunk, while the robot moves."""
