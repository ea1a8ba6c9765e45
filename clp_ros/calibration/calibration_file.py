# SPDX-License-Identifier: Apache-2.0
"""What calibration found, and its folder: calibration.json and cka.npz."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object

SCHEMA_VERSION = 1
JSON_FILE = "calibration.json"
MATRICES_FILE = "cka.npz"
# What pruning reads of calibration.json besides the scores.
_FIELDS = {"checkpoint": dict, "family": str, "modules": dict}
_MODULE_FIELDS = {"layers": int, "group": str, "period": int, "dead_last": bool}


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        meta: How it was made, as it stands in calibration.json; ``meta["modules"]`` holds, by module name, its layers,
            group, period and whether its last layer's output reaches nothing.
        matrices: CKA of all pairs of layers, (L, L) float64, by module: that of neighbours over all tokens, that of
            other pairs over a random part of them where they are many.
        mse: Mean squared error between neighbours' hidden states, (L-1,) float64, by module.
        cosine: Mean cosine similarity between them, (L-1,) float64, by module.
    """

    meta: dict[str, Any]
    matrices: dict[str, np.ndarray]
    mse: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]

    @property
    def adjacent(self) -> dict[str, np.ndarray]:
        """CKA of neighbours, by module: element i is CKA(H_i, H_{i+1}), (L-1,) float64."""
        return {name: np.diagonal(matrix, offset=1).copy() for name, matrix in self.matrices.items()}

    def save(self, folder: Path) -> None:
        """Writes calibration.json and cka.npz. The same calibration gives the same bytes."""
        modules = {
            name: self.meta["modules"][name]
            | {
                "adjacent": self.adjacent[name].tolist(),
                "mse": self.mse[name].tolist(),
                "cosine": self.cosine[name].tolist(),
            }
            for name in self.matrices
        }
        document = {"schema_version": SCHEMA_VERSION, **self.meta, "modules": modules}
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
        fix = "run clp calibrate again, or give the folder it wrote"
        try:
            document = read_json_object(path, fix)
            matrices = _read_matrices(Path(folder) / MATRICES_FILE)
        except FileNotFoundError as error:
            raise ClpError("this is no calibration folder", where=error.filename, fix=fix) from None
        except ClpError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
            raise ClpError(f"the calibration cannot be read ({error})", where=folder, fix=fix) from error
        found = document.pop("schema_version", None)
        if found != SCHEMA_VERSION:
            raise ClpError(f"schema version {found!r}, expected {SCHEMA_VERSION}", where=path, fix=fix)
        try:
            series = _check_document(document, matrices)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ClpError(f"the calibration is damaged ({error!r})", where=path, fix=fix) from error
        return cls(document, {name: matrices[name] for name in series["mse"]}, series["mse"], series["cosine"])


def _read_matrices(path: Path) -> dict[str, np.ndarray]:
    # Not np.load: given anything but a zip file it guesses what it is.
    with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _check_document(document: dict[str, Any], matrices: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Takes the series of scores out of a parsed calibration.json and holds all of it against the matrices."""
    if not all(isinstance(document[key], kind) for key, kind in _FIELDS.items()):
        raise TypeError(f"{', '.join(_FIELDS)} are not of their types")
    if not all(isinstance(document["checkpoint"][key], str) for key in ("path", "fingerprint")):
        raise TypeError("the checkpoint's path and fingerprint are not text")
    modules = document["modules"]
    if modules.keys() != matrices.keys():
        raise ValueError(f"{JSON_FILE} is of {', '.join(modules)}, {MATRICES_FILE} of {', '.join(matrices)}")
    series = {
        key: {name: np.array(module.pop(key), dtype=np.float64) for name, module in modules.items()}
        for key in ("adjacent", "mse", "cosine")
    }
    groups: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        if not all(type(module[key]) is kind for key, kind in _MODULE_FIELDS.items()):
            raise TypeError(f"{name}: {', '.join(_MODULE_FIELDS)} are not of their types")
        layers, matrix = module["layers"], matrices[name]
        fixed, least = module.setdefault("fixed", []), module.setdefault("least", 1)  # later keys
        if type(least) is not int or not 1 <= least <= layers:
            raise TypeError(f"{name}: least is not a number of its layers")
        if not isinstance(fixed, list) or not all(type(layer) is int and 0 <= layer < layers for layer in fixed):
            raise TypeError(f"{name}: fixed is not a list of its layers")
        shapes = {key: series[key][name].shape for key in series} | {"cka": matrix.shape}
        if shapes != dict.fromkeys(series, (layers - 1,)) | {"cka": (layers, layers)}:
            raise ValueError(f"{name}: {shapes} do not fit {layers} layers")
        if matrix.dtype != np.float64 or not all(
            np.isfinite(x).all() for x in (matrix, *(s[name] for s in series.values()))
        ):
            raise ValueError(f"{name}: not all scores are finite float64 numbers")
        if not np.array_equal(np.diagonal(matrix, offset=1), series["adjacent"][name]):
            raise ValueError(f"{name}: {JSON_FILE} and {MATRICES_FILE} are not of one calibration")
        if module["period"] < 1 or groups.setdefault(module["group"], (layers, module["period"])) != (
            layers,
            module["period"],
        ):
            raise ValueError(f"{name}: the modules of {module['group']} differ in depth or period")
    return series
