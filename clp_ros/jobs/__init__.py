# SPDX-License-Identifier: Apache-2.0
"""One file a job: what the command line, the nodes and the demo call."""
