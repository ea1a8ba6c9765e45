# SPDX-License-Identifier: Apache-2.0
"""A simulated robot behind the same topics as the real one, and demonstrations that it plays."""
