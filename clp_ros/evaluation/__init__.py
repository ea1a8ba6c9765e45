# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs and whether it loads: parameters, FLOPs, latency, memory."""
