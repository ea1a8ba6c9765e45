# SPDX-License-Identifier: Apache-2.0
"""What a policy family is; reading a checkpoint of one and running it; a folder a family."""
