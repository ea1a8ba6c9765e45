# SPDX-License-Identifier: Apache-2.0
"""Episodes of a bag: observations on control ticks, each with the actions that followed."""
