# SPDX-License-Identifier: Apache-2.0
"""VLA families: what a checkpoint of each looks like, how to read it and how to run it."""
