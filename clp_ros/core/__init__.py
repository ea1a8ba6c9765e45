# SPDX-License-Identifier: Apache-2.0
"""What everything rests on: errors, validated settings, output folders written whole or not at all, processes."""
