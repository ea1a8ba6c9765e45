# SPDX-License-Identifier: Apache-2.0
"""SmolVLA, Hugging Face's 450 M policy: `lerobot/smolvla_base`."""
