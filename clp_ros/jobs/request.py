# SPDX-License-Identifier: Apache-2.0
"""Base classes of the requests and results of all jobs."""

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
# The seeds that NumPy and PyTorch accept.
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Request(StrictModel):
    """The arguments of a job. Immutable, and validated at creation.

    Raises:
        ClpError: A value is missing, unknown or out of range. The message names the job and the value.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            # An unknown name first: for a mistyped name, pydantic lists the missing one before the unknown one.
            fault = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
            raise ClpError(
                f"{place(fault)} {describe(fault)}".strip(),
                where=type(self).__module__.rpartition(".")[2].replace("_", "-"),  # as the command
                hint=self._hint(fault, values),
            ) from error

    @classmethod
    def _hint(cls, fault: Mapping[str, Any], values: Mapping[str, Any]) -> str | None:
        """Returns the nearest known name or choice to an unknown one."""
        if fault["type"] == "extra_forbidden":
            return did_you_mean(place(fault), [field for field in cls.model_fields if field not in values])
        if fault["type"] == "literal_error" and isinstance(fault["input"], str):
            return did_you_mean(
                fault["input"], [str(choice) for choice in get_args(cls.model_fields[str(fault["loc"][0])].annotation)]
            )
        return None


class Result(StrictModel):
    """The result of a job. Fields marked ``exclude`` are for callers in Python only."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object that ``--json`` prints."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Returns the result from a document of :meth:`to_json`, without the fields for callers in Python.

        Raises:
            pydantic.ValidationError: The document is not one of this class.
        """
        return cls.model_validate_json(json.dumps(document))
