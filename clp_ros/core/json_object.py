# SPDX-License-Identifier: Apache-2.0
"""Reads JSON files strictly: invalid JSON and repeated keys are errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.core.files import refuse_lfs_pointer

_HINT = "give an undamaged copy of the file"


def parse_json(text: bytes, where: object, hint: str = _HINT) -> Any:
    """Parses JSON.

    Args:
        text: UTF-8 JSON.
        where: Its source, for the error.
        hint: What the user can do about a fault.

    Raises:
        ClpError: Not UTF-8, not JSON, or a key that occurs twice (readers silently keep one or the other).
    """

    if len(text) >= 8:
        refuse_lfs_pointer(text, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ClpError(f"the JSON key {repeated!r} occurs twice", where=where, hint=hint)
        return parsed

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ClpError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError, JSONDecodeError, numbers that are too long, or too deep nesting
        raise ClpError(f"not valid JSON ({error})", where=where, hint=hint) from error


def parse_json_object(text: bytes, where: object, hint: str = _HINT) -> dict[str, Any]:
    """Parses one JSON object. See :func:`parse_json`; anything but an object is a ClpError too."""
    parsed = parse_json(text, where, hint)
    if not isinstance(parsed, dict):
        raise ClpError(f"not a JSON object but {type(parsed).__name__}", where=where, hint=hint)
    return parsed


def read_json_object(path: Path, hint: str = _HINT) -> dict[str, Any]:
    """Reads a file that holds one JSON object. See :func:`parse_json_object`."""
    return parse_json_object(path.read_bytes(), path, hint)
