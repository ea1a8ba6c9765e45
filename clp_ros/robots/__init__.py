# SPDX-License-Identifier: Apache-2.0
"""A robot as a policy sees it: its topics, its joints, observations and trajectories."""
