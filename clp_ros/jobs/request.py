# SPDX-License-Identifier: Apache-2.0
"""What is common to the requests and results of all jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
            fault = error.errors()[0]
            name = place(fault)
            known = [field for field in type(self).model_fields if field not in values]
            hint = did_you_mean(name, known) if fault["type"] == "extra_forbidden" else None
            raise ClpError(f"{name} {describe(fault)}", fix=hint) from error


class Result(StrictModel):
    """What a job gives back. Fields that are marked ``exclude`` are for callers in Python only."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def to_json(self) -> dict[str, Any]:
        """The result as the one JSON object that ``--json`` prints."""
        return self.model_dump(mode="json")
