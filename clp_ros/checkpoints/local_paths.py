# SPDX-License-Identifier: Apache-2.0
"""Paths in a checkpoint's JSON files that lead to what the checkpoint itself holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def moved(name: str, inside: str, folder: Path) -> str:
    """A path to the checkpoint's own sub-folder ``inside``, as it is in ``folder``.

    A hub id, or a path to something kept elsewhere, is the user's own and stays.
    """
    return str(folder / inside) if Path(name).is_absolute() and Path(name).name == inside else name


def move_tokenizer(documents: Mapping[str, dict[str, Any]], inside: str, folder: Path) -> None:
    """Lets the preprocessor find its tokenizer, in place, in the checkpoint's own sub-folder ``inside``."""
    for step in documents.get("policy_preprocessor.json", {}).get("steps", []):
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = moved(step["config"]["tokenizer_name"], inside, folder)
