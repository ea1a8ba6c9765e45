# SPDX-License-Identifier: Apache-2.0
"""The simulated tasks of clp_ros, one a file. Every module here with a ``TASK`` is found by itself."""
