# SPDX-License-Identifier: Apache-2.0
"""ROS glue: parameters, topics, services, lifecycle and diagnostics. What the nodes do is in the packages below."""
