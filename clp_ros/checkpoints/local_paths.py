# SPDX-License-Identifier: Apache-2.0
"""Rewrites paths in a checkpoint's JSON files that lead into the checkpoint's own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def moved(name: str, inside: str, folder: Path) -> str:
    """Returns the path of the sub-folder ``inside`` of ``folder``, if ``name`` leads to the checkpoint's own
    sub-folder.

    A Hub id, or a path elsewhere, is returned unchanged. A relative path has more parts than a Hub id; a checkpoint in
    a repository has one, so that stock lerobot finds the sub-folder from the repository's root.
    """
    path = Path(name)
    local = path.is_absolute() or len(path.parts) > 2
    return str(folder / inside) if local and path.name == inside else name


def move_tokenizer(documents: Mapping[str, dict[str, Any]], inside: str, folder: Path) -> None:
    """Makes the preprocessor load its tokenizer from the checkpoint's own sub-folder ``inside``. Changes
    ``documents``."""
    for step in documents.get("policy_preprocessor.json", {}).get("steps", []):
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = moved(step["config"]["tokenizer_name"], inside, folder)
