# SPDX-License-Identifier: Apache-2.0
"""Scenes that several tasks share."""
