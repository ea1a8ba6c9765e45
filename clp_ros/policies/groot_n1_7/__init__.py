# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.7, NVIDIA's humanoid policy: `nvidia/GR00T-N1.7-3B`."""
