# SPDX-License-Identifier: Apache-2.0
"""The base of all documents validated by pydantic, and error messages without Python's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Immutable, no unknown keys, no NaN, no type guessing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# pydantic's error types, and our messages. Braces are filled from the error's context.
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not known",
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "must be a mapping"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    **dict.fromkeys(("int_type", "int_from_float"), "must be a whole number"),
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entries, not {actual_length}",
    "too_long": "must have at most {max_length} entries, not {actual_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}


def place(fault: Mapping[str, Any]) -> str:
    """The key at fault, as ``cameras.front.topic``; empty for the whole document. See :func:`describe`."""
    return ".".join(str(part) for part in fault["loc"])


def describe(fault: Mapping[str, Any]) -> str:
    """Describes one of ``ValidationError.errors()`` in a few words, with the value if it is short."""
    words = _WORDS.get(fault["type"])
    what = words.format(**fault.get("ctx", {})) if words else fault["msg"].removeprefix("Value error, ")
    without_value = fault["type"] in ("missing", "extra_forbidden", "value_error", "too_short", "too_long")
    if not without_value and isinstance(fault["input"], str | int | float | None):
        what += f", not {fault['input']!r}"
    return what
