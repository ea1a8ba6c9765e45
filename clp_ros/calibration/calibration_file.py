# SPDX-License-Identifier: Apache-2.0
"""The results of a calibration, and their folder with calibration.json and cka.npz."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from clp_ros.checkpoints.manifest import Source
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.core.strict_model import StrictModel, describe, place

SCHEMA_VERSION = 1
JSON_FILE = "calibration.json"
MATRICES_FILE = "cka.npz"
_SERIES = {"adjacent", "mse", "cosine"}
_Count = Annotated[int, Field(ge=0)]


class StackScores(StrictModel):
    """A layer stack's entry in calibration.json.

    Attributes:
        layers: Number of layers.
        group: Stacks of one group lose the same layers.
        period: Layer kinds alternate with the layer index at this period.
        dead_last: Whether the last layer's output is not used.
        fixed: 0-based layers that may not be removed.
        least: Minimum number of layers that must be left.
        adjacent: CKA of adjacent layers, (L-1,).
        mse: Mean squared error between the hidden states of adjacent layers, (L-1,).
        cosine: Mean cosine similarity of these states, (L-1,).
    """

    model_config = ConfigDict(extra="allow")

    layers: Annotated[int, Field(ge=1)]
    group: str
    period: Annotated[int, Field(ge=1)]
    dead_last: bool
    fixed: list[_Count] = Field(default_factory=list)
    least: Annotated[int, Field(ge=1)] = 1
    adjacent: list[float]
    mse: list[float]
    cosine: list[float]

    @model_validator(mode="after")
    def _fits_its_layers(self) -> Self:
        if self.least > self.layers or any(layer >= self.layers for layer in self.fixed):
            raise ValueError(f"least or fixed do not fit {self.layers} layers")
        if {len(self.adjacent), len(self.mse), len(self.cosine)} != {self.layers - 1}:
            raise ValueError(f"adjacent, mse and cosine do not fit {self.layers} layers")
        return self


class CalibrationDocument(StrictModel):
    """The keys of calibration.json that pruning reads. The file has more, about how it was made."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1]
    checkpoint: Source
    family: str
    modules: dict[str, StackScores]

    @model_validator(mode="after")
    def _groups_agree(self) -> Self:
        kinds = {(stack.group, stack.layers, stack.period) for stack in self.modules.values()}
        if len(kinds) > len({group for group, _, _ in kinds}):
            raise ValueError("modules of one group differ in layers or period")
        return self


@dataclass(frozen=True)
class Calibration:
    """The results of a calibration.

    Attributes:
        meta: The content of calibration.json. ``meta["modules"]`` has by layer stack its layers, group, period and
            whether its last layer's output is unused.
        matrices: CKA of all pairs of layers, (L, L) float64, by layer stack. Adjacent layers are compared over all
            tokens, other pairs over a random part if there are many tokens.
        mse: Mean squared error between the hidden states of adjacent layers, (L-1,) float64, by layer stack.
        cosine: Mean cosine similarity of these states, (L-1,) float64, by layer stack.
    """

    meta: dict[str, Any]
    matrices: dict[str, np.ndarray]
    mse: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]

    @property
    def adjacent(self) -> dict[str, np.ndarray]:
        """CKA of adjacent layers by layer stack: element i is CKA(H_i, H_{i+1}), (L-1,) float64."""
        return {name: np.diagonal(matrix, offset=1).copy() for name, matrix in self.matrices.items()}

    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries of the layer stacks in calibration.json, with the keys of :class:`StackScores`."""
        series = {"adjacent": self.adjacent, "mse": self.mse, "cosine": self.cosine}
        return {
            name: self.meta["modules"][name] | {key: values[name].tolist() for key, values in series.items()}
            for name in self.matrices
        }

    def save(self, folder: Path) -> None:
        """Writes calibration.json and cka.npz. Equal calibrations give equal bytes."""
        document = {"schema_version": SCHEMA_VERSION, **self.meta, "modules": self.entries()}
        (folder / JSON_FILE).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        arrays: dict[str, Any] = self.matrices
        np.savez(folder / MATRICES_FILE, **arrays)

    @classmethod
    def load(cls, folder: str | Path) -> Calibration:
        """Reads a calibration folder.

        Raises:
            ClpError: A file is missing or damaged, or another version of clp_ros wrote it.
        """
        path = Path(folder) / JSON_FILE
        hint = "run `clp calibrate` again, or give the folder that it wrote"
        try:
            document = read_json_object(path, hint)
            matrices = _read_matrices(Path(folder) / MATRICES_FILE)
        except FileNotFoundError as error:
            raise ClpError("the folder is not a calibration", where=error.filename, hint=hint) from None
        except ClpError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
            raise ClpError(f"the calibration cannot be read ({error})", where=folder, hint=hint) from error
        try:
            modules = CalibrationDocument.model_validate(document).modules
            _check_matrices(modules, matrices)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ClpError(f"not a calibration: {place(first)} {describe(first)}", where=path, hint=hint) from error
        except ValueError as error:
            raise ClpError(f"the calibration is damaged ({error})", where=path, hint=hint) from error
        meta = {name: value for name, value in document.items() if name != "schema_version"}
        meta["modules"] = {name: stack.model_dump(exclude=_SERIES) for name, stack in modules.items()}
        mse, cosine = (
            {n: np.array(getattr(s, key), dtype=np.float64) for n, s in modules.items()} for key in ("mse", "cosine")
        )
        return cls(meta, {name: matrices[name] for name in modules}, mse, cosine)


def _read_matrices(path: Path) -> dict[str, np.ndarray]:
    # np.load is not used, because it guesses the type of a file that is not a zip archive.
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _check_matrices(modules: Mapping[str, StackScores], matrices: Mapping[str, np.ndarray]) -> None:
    """Compares cka.npz with calibration.json.

    Raises:
        ValueError: They belong to different calibrations.
    """
    if modules.keys() != matrices.keys():
        raise ValueError(f"{JSON_FILE} is of {', '.join(modules)}, {MATRICES_FILE} of {', '.join(matrices)}")
    for name, matrix in matrices.items():
        layers = modules[name].layers
        if matrix.shape != (layers, layers) or matrix.dtype != np.float64 or not np.isfinite(matrix).all():
            raise ValueError(f"{name}: the matrix is not {layers} x {layers} finite float64 numbers")
        if not np.array_equal(np.diagonal(matrix, offset=1), modules[name].adjacent):
            raise ValueError(f"{name}: {JSON_FILE} and {MATRICES_FILE} are not of one calibration")
