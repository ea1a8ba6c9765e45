# SPDX-License-Identifier: Apache-2.0
"""Faults of documents, in words for people who do not write Python."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from clp_ros.core.strict_model import StrictModel, describe, place


class Part(StrictModel):
    count: Annotated[int, Field(ge=0, lt=10)] = 0
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    name: Annotated[str, Field(min_length=1, pattern="^[a-z]*$")] = "a"
    kind: Literal["hold", "drop"] = "hold"
    on: bool = True
    layers: Annotated[list[int], Field(min_length=1, max_length=2)] = [1]  # noqa: RUF012 - a default of pydantic's


class Whole(StrictModel):
    parts: dict[str, Part]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"count": 1.5}, "count must be a whole number, not 1.5"),
        ({"count": "1"}, "count must be a whole number, not '1'"),
        ({"count": -1}, "count must be at least 0, not -1"),
        ({"count": 10}, "count must be less than 10, not 10"),
        ({"share": "half"}, "share must be a number, not 'half'"),
        ({"share": 0}, "share must be greater than 0.0, not 0"),
        ({"share": 2}, "share must be at most 1.0, not 2"),
        ({"share": float("nan")}, "share must be a finite number, not nan"),
        ({"name": 3}, "name must be text, not 3"),
        ({"name": ""}, "name must have at least 1 characters, not ''"),
        ({"name": "A"}, "name must match ^[a-z]*$, not 'A'"),
        ({"kind": "asof"}, "kind must be 'hold' or 'drop', not 'asof'"),
        ({"on": "yes"}, "on must be true or false, not 'yes'"),
        ({"layers": 1}, "layers must be a list, not 1"),
        ({"layers": []}, "layers must have at least 1 entries, not 0"),
        ({"layers": [1, 2, 3]}, "layers must have at most 2 entries, not 3"),
        ({"layers": [None]}, "layers.0 must be a whole number, not None"),
        ({"more": 1}, "more is not known"),
        ([], " must be a mapping"),
    ],
    ids=str,
)
def test_faults_are_described_in_plain_words(part: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"parts": {"front": part}})
    (fault,) = caught.value.errors()
    assert f"{place(fault)} {describe(fault)}" == f"parts.front{'' if expected.startswith(' ') else '.'}{expected}"
