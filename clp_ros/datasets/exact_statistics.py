# SPDX-License-Identifier: Apache-2.0
"""Exact statistics of a LeRobotDataset, over all its frames and pixels.

LeRobot averages each episode's quantiles, which gives other values than the quantiles of all frames, and samples
pictures. Policies that normalise by quantiles need the exact ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
"""LeRobot's quantiles, stored as q01, q10, q50, q90 and q99."""

_LEVELS = 256
_NUMBERS = ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


class PixelCounts:
    """Counts the pixels of a camera's pictures by channel and value: exact statistics in constant memory.

    Attributes:
        frames: Number of pictures.
        counts: (channels, 256) int64.
    """

    def __init__(self, frames: int = 0, counts: Any = None) -> None:
        self.frames = frames
        self.counts = np.zeros((3, _LEVELS), dtype=np.int64) if counts is None else np.array(counts, dtype=np.int64)

    def add(self, picture: np.ndarray) -> None:
        """Counts a picture's pixels: (height, width, 3) uint8."""
        self.frames += 1
        for channel in range(len(self.counts)):
            found = cv2.calcHist([picture], [channel], None, [_LEVELS], [0, _LEVELS])
            self.counts[channel] += found[:, 0].astype(np.int64)

    def __add__(self, other: PixelCounts) -> PixelCounts:
        """Returns the counts of both."""
        return PixelCounts(self.frames + other.frames, self.counts + other.counts)

    def statistics(self) -> dict[str, np.ndarray]:
        """Returns LeRobot's statistics of a camera: (channels, 1, 1) float64 of values from 0 to 1; and the count."""
        levels = np.arange(_LEVELS) / (_LEVELS - 1)
        pixels = self.counts.sum(axis=1)
        mean = self.counts @ levels / pixels
        variance = (self.counts * (levels - mean[:, None]) ** 2).sum(axis=1) / pixels
        found = {
            "min": np.array([levels[np.flatnonzero(row)[0]] for row in self.counts]),
            "max": np.array([levels[np.flatnonzero(row)[-1]] for row in self.counts]),
            "mean": mean,
            "std": np.sqrt(variance),
        }
        for quantile in QUANTILES:
            found[_name(quantile)] = np.array([self._quantile(row, quantile) for row in self.counts])
        shaped = {name: value.reshape(-1, 1, 1) for name, value in found.items()}
        return shaped | {"count": np.array([self.frames])}

    @staticmethod
    def _quantile(row: np.ndarray, quantile: float) -> float:
        """Returns what ``numpy.quantile`` returns for the counted values, between 0 and 1."""
        cumulated = np.cumsum(row)
        place = quantile * (int(cumulated[-1]) - 1)
        below = int(np.floor(place))
        low, high = np.searchsorted(cumulated, [below, min(below + 1, int(cumulated[-1]) - 1)], side="right")
        return float(low + (high - low) * (place - below)) / (_LEVELS - 1)


def exact_statistics(
    root: Path, features: Mapping[str, Mapping[str, Any]], pixels: Mapping[str, PixelCounts]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the content of stats.json.

    One component of a feature is in memory at a time: 4 MB for a million frames.

    Args:
        root: The dataset, complete.
        features: Those of its info.json.
        pixels: The pixels of each camera.
    """
    found = {name: counts.statistics() for name, counts in pixels.items()}
    files = sorted((root / "data").glob("*/*.parquet"))
    for name, feature in features.items():
        if feature["dtype"] in _NUMBERS:
            size = int(np.prod(feature["shape"]))
            columns = [_statistics(_component(files, name, index, size)) for index in range(size)]
            found[name] = {key: np.array([column[key] for column in columns]) for key in columns[0]}
            found[name]["count"] = found[name]["count"][:1]
    return found


def _component(files: list[Path], name: str, index: int, size: int) -> np.ndarray:
    parts = []
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1 << 16, columns=[name]):
                column = batch.column(0)
                flat = column.flatten() if hasattr(column, "flatten") and size > 1 else column
                parts.append(np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(-1, size)[:, index].copy())
    return np.concatenate(parts)


def _statistics(values: np.ndarray) -> dict[str, Any]:
    exact = values.astype(np.float64)
    found: dict[str, Any] = {"min": values.min(), "max": values.max(), "mean": exact.mean(), "std": exact.std()}
    for quantile, value in zip(QUANTILES, np.quantile(exact, QUANTILES), strict=True):
        found[_name(quantile)] = value
    return found | {"count": len(values)}


def _name(quantile: float) -> str:
    return f"q{round(quantile * 100):02d}"
