# SPDX-License-Identifier: Apache-2.0
"""Distances between the hidden states of adjacent layers: the criteria with which CKA is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from clp_ros.calibration.hidden_states import checked_states
from clp_ros.core.errors import ClpError

_CHUNK_BYTES = 2**20  # of a layer's float64 rows at a time: rows that stay in the cache are several times as fast


class AdjacentDistances:
    """Mean squared error and cosine similarity between the hidden states of adjacent layers (paper RQ2).

    The squared error is the mean of ``(H_{i+1} - H_i)^2`` over all tokens and features. The cosine is the mean over all
    tokens of the cosine between a token's two states. The cosine of a zero vector is 0, but 1 with another zero vector.

    Args:
        num_layers: Number of layers L, all of one width.
        name: The layer stack's name, for error messages.
        device: Device of the sums; by default that of the first update.
    """

    def __init__(self, num_layers: int, *, name: str = "", device: str | torch.device | None = None) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        self.num_layers = num_layers
        self.name = name
        self._device = None if device is None else torch.device(device)
        # (2, L-1): squared errors (a mean over features), cosines.
        self._sums = torch.zeros(2, num_layers - 1, dtype=torch.float64, device=self._device)
        self.tokens = 0

    @torch.no_grad()
    def update(self, hidden: Sequence[torch.Tensor]) -> None:
        """Adds tokens: as :meth:`clp_ros.calibration.similarity.LinearCKA.update`, with one width for all layers."""
        states, self._device = checked_states(hidden, self.num_layers, self.name, self._device, copy=False)
        if len({x.shape for x in states}) > 1:
            raise ValueError(f"layers must share one shape, not {[tuple(x.shape) for x in states]}")
        self._sums = self._sums.to(self._device)
        if len(states[0]) == 0:
            return
        rows = max(1, _CHUNK_BYTES // (8 * states[0].shape[1])) if self._device.type == "cpu" else len(states[0])
        for chunk in zip(*(state.split(rows) for state in states), strict=True):
            self._add(chunk)
        self.tokens += len(states[0])

    def _add(self, states: Sequence[torch.Tensor]) -> None:
        lower = states[0].double()
        lower_norm = torch.linalg.vector_norm(lower, dim=1)
        for i, state in enumerate(states[1:]):
            upper = state.double()
            upper_norm = torch.linalg.vector_norm(upper, dim=1)
            difference = upper - lower
            either_zero = (lower_norm == 0) | (upper_norm == 0)
            both_zero = ((lower_norm == 0) & (upper_norm == 0)).double()
            # Divided by one norm after the other, because their product can underflow.
            units = torch.where(lower_norm == 0, 1, lower_norm), torch.where(upper_norm == 0, 1, upper_norm)
            cosine = torch.linalg.vecdot(lower, upper) / units[0] / units[1]
            self._sums[0, i] += torch.linalg.vecdot(difference, difference).sum() / lower.shape[1]
            self._sums[1, i] += torch.where(either_zero, both_zero, cosine).sum()
            lower, lower_norm = upper, upper_norm

    @torch.no_grad()
    def merge(self, other: AdjacentDistances) -> Self:
        """Adds all tokens of ``other`` in place. ``other`` is not changed."""
        if other.num_layers != self.num_layers:
            raise ValueError("cannot merge distances of different numbers of layers")
        self._device = self._device or other._device
        self._sums = self._sums.to(self._device) + other._sums.to(self._device)
        self.tokens += other.tokens
        return self

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Adds the sums of all processes of a torch.distributed group, in place and in every process.

        Some processes may have no tokens, as in :meth:`clp_ros.calibration.similarity.LinearCKA.all_reduce`.
        """
        import torch.distributed as dist

        tokens = torch.tensor([self.tokens], dtype=torch.int64, device=self._device)
        dist.all_reduce(tokens, group=group)
        dist.all_reduce(self._sums, group=group)
        self.tokens = int(tokens.item())
        return self

    def mse(self) -> np.ndarray:
        """Mean squared error of adjacent layers, (L-1,) float64; ClpError if there were no tokens."""
        return self._mean(0)

    def cosine(self) -> np.ndarray:
        """Mean cosine similarity of adjacent layers, (L-1,) float64; ClpError if there were no tokens."""
        return self._mean(1)

    def _mean(self, row: int) -> np.ndarray:
        if self.tokens == 0:
            raise ClpError("no tokens were calibrated on", where=self.name or None, hint="use more samples")
        return (self._sums[row] / self.tokens).cpu().numpy()
