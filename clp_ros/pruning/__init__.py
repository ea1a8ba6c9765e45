# SPDX-License-Identifier: Apache-2.0
"""What to remove from a checkpoint, and how: selection and surgery."""
