# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a policy on demonstrations, and how alike its layers are (paper section 3)."""
