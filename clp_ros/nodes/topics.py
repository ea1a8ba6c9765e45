# SPDX-License-Identifier: Apache-2.0
"""Qualities of service that the nodes share."""

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

LATCHED = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
)
"""For results: who subscribes later gets the last message, as long as its publisher lives."""

SENSOR_INPUT = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
)
"""Hears best-effort publishers (camera drivers) as well as reliable ones; a reliable subscription hears only those."""
