# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: where it lies, headers, tensor names, manifest."""
