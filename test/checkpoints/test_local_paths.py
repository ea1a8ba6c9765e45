# SPDX-License-Identifier: Apache-2.0
"""Which names in a checkpoint's JSON files lead into its own folder."""

from pathlib import Path

import pytest

from clp_ros.checkpoints.local_paths import moved


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/old/policy/vlm", "/new/vlm"),
        ("checkpoints/policy/vlm", "/new/vlm"),
        ("somebody/vlm", "somebody/vlm"),  # a repository on the Hub
        ("/old/policy/other", "/old/policy/other"),
    ],
)
def test_paths_into_the_checkpoint_follow_it(name, expected):
    assert moved(name, "vlm", Path("/new")) == expected
