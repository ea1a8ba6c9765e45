# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5, NVIDIA's humanoid policy: `nvidia/GR00T-N1.5-3B`."""
