# SPDX-License-Identifier: Apache-2.0
"""π0, Physical Intelligence's flow-matching policy: `lerobot/pi0_base`."""
