# SPDX-License-Identifier: Apache-2.0
"""Recorded demonstrations: rosbag2 in, messages and frames out."""
