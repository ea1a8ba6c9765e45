# SPDX-License-Identifier: Apache-2.0
"""What is common to the requests and results of all jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import ConfigDict, Field, ValidationError

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.core.strict_model import StrictModel, describe, place

# A path may be given as text.
FilePath = Annotated[Path, Field(strict=False)]
FilePaths = Annotated[tuple[FilePath, ...], Field(strict=False)]
# What numpy and torch take as a seed.
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Request(StrictModel):
    """What a job is asked to do. Immutable; validated when it is made.

    Raises:
        ClpError: A value is missing, unknown or out of its range; the message names it.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            # An unknown name first: where a needed one is mistyped, pydantic names the missing one before it.
            fault = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
            raise ClpError(f"{place(fault)} {describe(fault)}".strip(), fix=self._hint(fault, values)) from error

    @classmethod
    def _hint(cls, fault: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
        """The nearest name or choice to one that is not known."""
        if fault["type"] == "extra_forbidden":
            return did_you_mean(place(fault), [field for field in cls.model_fields if field not in values])
        if fault["type"] == "literal_error" and isinstance(fault["input"], str):
            return did_you_mean(
                fault["input"], [str(choice) for choice in get_args(cls.model_fields[str(fault["loc"][0])].annotation)]
            )
        return None


class Result(StrictModel):
    """What a job gives back. Fields that are marked ``exclude`` are for callers in Python only."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def to_json(self) -> dict[str, Any]:
        """The result as the one JSON object that ``--json`` prints."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The result that :meth:`to_json` gave this document of, without the fields for callers in Python.

        Raises:
            pydantic.ValidationError: The document is not one of this class.
        """
        return cls.model_validate_json(json.dumps(document))
