# SPDX-License-Identifier: Apache-2.0
"""π0.5, Physical Intelligence's successor of π0: `lerobot/pi05_base`."""
