# SPDX-License-Identifier: Apache-2.0
"""GR00T N1."""
