# SPDX-License-Identifier: Apache-2.0
"""Linear CKA between the hidden states of a layer stack.

It is computed over all tokens, from updates of any size. Memory does not grow with the number of tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from clp_ros.calibration import half_products
from clp_ros.calibration.hidden_states import HALF_DTYPES, checked_states
from clp_ros.core.errors import ClpError

_WORKSPACE_BYTES = 128 * 2**20  # float64 rows that one fold multiplies at a time
_GRAM_ROWS = 512  # a block of Gram matrices is this many tokens square
_LEAST_TOKENS = 1024  # with fewer tokens, folding is limited by memory bandwidth
_FLOAT32_TOKENS = 4096  # tokens folded at a time with float32 products
_TRIANGLE = (
    256  # columns of a block row: of a layer's symmetric product with itself, only the upper block triangle is computed
)


class LinearCKA:
    """Centred linear CKA between the hidden states of a stack's layers (paper section 3, step 2 of the method).

    ``CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` over column-centred ``X``, ``Y`` of all tokens together (the
    biased estimate; a mean over batches would differ). Layers may differ in width.

    The CKA of a state that is equal for all tokens is 0 with any varying state, and 1 with any constant state.

    There are two exact ways to the same sums. Few tokens are kept in a buffer of at most ``buffer_bytes``, and
    ``||Y'X||_F^2`` is the inner product of two Gram matrices, computed block by block. When the buffer is full, or the
    other way is cheaper, the tokens are folded into centred float64 cross products ``X_i'X_j`` (Chan, Golub and
    LeVeque's update, so that a large common offset costs no precision). All later tokens are folded as well.

    With ``products="float32"``, half-precision states are folded faster: products are computed in float32, summed in
    float32 over up to 4096 tokens, and these sums in float64. Scores are within 1e-7 of float64's on every processor
    (:mod:`clp_ros.calibration.half_products`). States of other dtypes are always multiplied in float64.

    Memory, with ``d_i`` the layers' widths: ``buffer_bytes`` and, once folded, ``8 sum(d_i d_j)`` bytes over the pairs
    (i <= j): ``4 L (L + 1) d^2`` for all pairs, ``8 (2 L - 1) d^2`` for adjacent ones; about 0.5 GiB of
    workspace at most. For 18 layers of 2048 that is 5.7 GB or 1.2 GB: ``scratch`` keeps it in a file instead.

    Args:
        num_layers: Number of layers L.
        pairs: ``"all"`` for the whole matrix, ``"adjacent"`` for adjacent layers only (fewer sums, less time).
        products: ``"float64"``, or ``"float32"`` for the faster sums of half-precision states, as above.
        name: The layer stack's name, for error messages.
        buffer_bytes: Size of the buffer. Folding begins when the tokens need more, but not below 1024 tokens.
        scratch: A folder in which the cross products are memory-mapped from an unnamed file. Only for sums on the CPU.
        device: Device of the sums; by default that of the first update.

    Example:
        >>> import torch
        >>> from clp_ros.calibration import LinearCKA
        >>> states = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> cka = LinearCKA(3)
        >>> cka.update([states, 2 * states + 1, states.square()])
        >>> cka.adjacent().round(3).tolist()
        [1.0, 0.921]
    """

    def __init__(
        self,
        num_layers: int,
        *,
        pairs: Literal["all", "adjacent"] = "all",
        products: Literal["float64", "float32"] = "float64",
        name: str = "",
        buffer_bytes: int = 512 * 2**20,
        scratch: str | Path | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        if pairs not in ("all", "adjacent"):
            raise ValueError(f"pairs must be 'all' or 'adjacent', not {pairs!r}")
        if products not in ("float64", "float32"):
            raise ValueError(f"products must be 'float64' or 'float32', not {products!r}")
        self.num_layers = num_layers
        self.pairs = pairs
        self.products = products
        self.name = name
        self.buffer_bytes = buffer_bytes
        self._scratch = scratch
        self._device = None if device is None else torch.device(device)
        self._columns: list[slice] = []  # columns of each layer, with all layers side by side
        self._origin = torch.empty(0, dtype=torch.float64)  # (D,), D = sum of widths: the first token; see _rows
        self._buffer: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._buffered = 0
        self._folded = 0
        self._mean = torch.empty(0, dtype=torch.float64)  # (D,), of the folded tokens, relative to the origin
        # For each layer i, (d_i, widths of the layers j >= i); of its product with itself, the upper block triangle.
        self._products: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        """Number of tokens added."""
        return self._folded + self._buffered

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors held between updates (those in ``scratch`` too)."""
        held = [*(x for layer in self._buffer for x in layer), *self._products]
        return sum(x.nbytes for x in [*held, *(self._origin, self._mean)])

    @torch.no_grad()
    def update(self, hidden: Sequence[torch.Tensor]) -> None:
        """Adds tokens.

        Args:
            hidden: One (tokens, dim) tensor for each layer, of any float dtype and device. They are copied, so that the
                model may change them afterwards. The number of tokens may differ between updates.

        Raises:
            ClpError: A hidden state holds NaN or infinity. Nothing is added then.
            ValueError: Wrong number of layers, shapes or dtypes.
        """
        states, self._device = checked_states(hidden, self.num_layers, self.name, self._device, copy=True)
        if self._columns and [x.shape[1] for x in states] != self._widths:
            raise ValueError(f"widths were {self._widths}, now {[x.shape[1] for x in states]}")
        if len(states[0]) == 0:
            return
        if not self._columns:
            self._start([x.shape[1] for x in states], torch.cat([x[0].double() for x in states]))
        self._append([[x] for x in states])

    @torch.no_grad()
    def merge(self, other: LinearCKA) -> Self:
        """Adds all tokens of ``other`` in place. ``other`` is not changed.

        Raises:
            ValueError: The two have different layers, widths or pairs.
        """
        if other is self:
            raise ValueError("cannot merge an accumulator with itself")
        if (other.num_layers, other.pairs) != (self.num_layers, self.pairs):
            raise ValueError("cannot merge accumulators of different layers or pairs")
        if not other._columns:
            return self
        if not self._columns:
            self._device = self._device or other._device
            self._start(other._widths, other._origin.to(self._device, copy=True))
        if self._widths != other._widths:
            raise ValueError(f"cannot merge widths {other._widths} into {self._widths}")
        if other._products:
            self._fold()
            shift = (other._origin.to(self._device) - self._origin) + other._mean.to(self._device)
            self._add_products(self._combined_mean(shift, other._folded)[None])
            for mine, theirs in zip(self._products, other._products, strict=True):
                mine += theirs.to(self._device)
        self._append([[x.to(self._device) for x in layer] for layer in other._buffer])
        return self

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Merges the sums of all processes of a torch.distributed group, in place and in every process.

        Some processes may have no tokens. If all tokens together fit into the buffer, they are exchanged; otherwise the
        cross products are summed. The sums must be on a device that the group's backend supports. A process without
        tokens needs the argument ``device``.

        Raises:
            ValueError: The processes have different layers, widths or pairs.
        """
        import torch.distributed as dist

        mine = (self.num_layers, self.pairs, self._widths, self._buffered, not self._products)
        everyone: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        seen = [rank for rank, other in enumerate(everyone) if other[2]]
        if not seen:
            return self
        widths = everyone[seen[0]][2]
        if any(other[:2] != mine[:2] or (other[2] and other[2] != widths) for other in everyone):
            raise ValueError("cannot merge accumulators of different layers, widths or pairs")
        first = seen[0] if group is None else dist.get_global_rank(group, seen[0])
        origin = torch.zeros(sum(widths), dtype=torch.float64, device=self._device)
        if not self._columns:
            self._start(widths, origin.clone())
        else:
            origin.copy_(self._origin)
        dist.broadcast(origin, src=first, group=group)
        buffered = [other[3] for other in everyone]
        if all(other[4] for other in everyone) and sum(buffered) <= max(self._gram_tokens, _LEAST_TOKENS):
            self._origin = origin
            self._exchange(buffered, group)
            return self
        self._fold()
        # Only differences from a common origin are summed, so that a constant feature stays exactly constant.
        shift = (self._origin - origin) + self._mean
        count = torch.tensor([self._folded], dtype=torch.float64, device=self._device)
        mean = shift * count
        dist.all_reduce(count, group=group)
        dist.all_reduce(mean, group=group)
        mean /= count
        self._add_products((math.sqrt(self._folded) * (shift - mean))[None])
        for products in self._products:
            dist.all_reduce(products, group=group)
        self._origin, self._mean, self._folded = origin, mean, int(count.item())
        return self

    def _exchange(self, buffered: Sequence[int], group: torch.distributed.ProcessGroup | None) -> None:
        """Collects the buffered tokens of all processes in every process, in the order of ranks."""
        import torch.distributed as dist

        self._join()
        dtypes: list = [None] * len(buffered)
        dist.all_gather_object(dtypes, [layer[0].dtype if layer else None for layer in self._buffer], group=group)
        for i, width in enumerate(self._widths):
            common = max((other[i] for other in dtypes if other[i] is not None), key=lambda dtype: dtype.itemsize)
            padded = torch.zeros(max(buffered), width, dtype=common, device=self._device)
            if self._buffer[i]:
                padded[: self._buffered] = self._buffer[i][0]
            parts = [torch.empty_like(padded) for _ in buffered]
            dist.all_gather(parts, padded, group=group)
            self._buffer[i] = [part[:count] for part, count in zip(parts, buffered, strict=True)]
        self._buffered = sum(buffered)
        self._join()

    def matrix(self) -> np.ndarray:
        """Returns the CKA of all pairs of layers.

        Returns:
            (L, L) float64, symmetric, 1 on the diagonal, within [0, 1].

        Raises:
            ClpError: There are fewer than two tokens.
            ValueError: The object was created with ``pairs="adjacent"``.
        """
        if self.pairs == "adjacent":
            raise ValueError("only adjacent pairs are computed (pairs='adjacent')")
        return self._similarity()

    def adjacent(self) -> np.ndarray:
        """Returns the CKA of adjacent layers: element i is CKA(H_i, H_{i+1}), (L-1,) float64. Raises as
        :meth:`matrix`."""
        return np.diagonal(self._similarity(), offset=1).copy()

    @property
    def _widths(self) -> list[int]:
        return [s.stop - s.start for s in self._columns]

    def _partners(self, layer: int) -> slice:
        """Returns the columns of the layers with which ``layer`` is multiplied: itself and later ones."""
        last = self.num_layers - 1 if self.pairs == "all" else min(layer + 1, self.num_layers - 1)
        return slice(self._columns[layer].start, self._columns[last].stop)

    def _start(self, widths: Sequence[int], origin: torch.Tensor) -> None:
        ends = np.cumsum(widths).tolist()
        self._columns = [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]
        self._origin = origin
        self._mean = torch.zeros_like(origin)
        # Gram matrices of n tokens cost about n^2 (sum of widths + pairs), folding costs 2 n (sum of width products).
        products = sum(w * (self._partners(i).stop - self._partners(i).start) for i, w in enumerate(widths))
        self._gram_tokens = 2 * products // (sum(widths) + self.num_layers**2)
        if self.products == "float32":
            self._gram_tokens //= 2  # float32 folding is about twice as fast

    def _append(self, states: Sequence[Sequence[torch.Tensor]]) -> None:
        for layer, new in zip(self._buffer, states, strict=True):
            layer.extend(new)
        self._buffered += sum(len(x) for x in states[0])
        if not self._products:
            held = sum(x.nbytes for layer in self._buffer for x in layer)
            full = held > self.buffer_bytes or self._buffered > self._gram_tokens
        else:
            full = self._buffered >= self._fold_rows
        if full and self._buffered > _LEAST_TOKENS:
            self._fold()

    @property
    def _fold_rows(self) -> int:
        if self.products == "float32":
            return _FLOAT32_TOKENS
        return max(64, _WORKSPACE_BYTES // (8 * len(self._origin)))

    def _rows(self, rows: int, first: int = 0) -> Iterator[torch.Tensor]:
        """Yields the buffered tokens from ``first`` on, relative to the origin, ``rows`` at a time: (rows, D) float64.

        The origin is a token, so that a constant feature is exactly zero. A rounded mean would leave noise, and CKA
        would compare the noise.
        """
        self._join()
        for start in range(first, self._buffered, rows):
            stop = min(start + rows, self._buffered)
            block = torch.empty(stop - start, len(self._origin), dtype=torch.float64, device=self._device)
            for columns, layer in zip(self._columns, self._buffer, strict=True):
                torch.sub(layer[0][start:stop], self._origin[columns], out=block[:, columns])
            yield block

    def _join(self) -> None:
        for layer in self._buffer:
            layer[:] = [torch.cat(layer)] if len(layer) > 1 else layer

    def _combined_mean(self, mean: torch.Tensor, count: int) -> torch.Tensor:
        """Adds ``count`` tokens of this mean to the folded mean, and returns the row that corrects the products."""
        total = self._folded + count
        delta = mean - self._mean
        row = delta * math.sqrt(self._folded * count / total)
        self._mean += delta * (count / total)
        self._folded = total
        return row

    def _block_rows(self, layer: int) -> Iterator[slice]:
        width = self._widths[layer]
        for first in range(0, width, _TRIANGLE):
            yield slice(first, min(first + _TRIANGLE, width))

    def _add_products(self, rows: torch.Tensor, factor: float = 1) -> None:
        for i, products in enumerate(self._products):
            mine, partners = rows[:, self._columns[i]], rows[:, self._partners(i)]
            for part in self._block_rows(i):
                products[part, part.start :].addmm_(mine[:, part].T, partners[:, part.start :], alpha=factor)

    def _fold(self) -> None:
        """Moves the buffered tokens into the cross products."""
        if not self._products:
            shapes = [(w, self._partners(i).stop - self._partners(i).start) for i, w in enumerate(self._widths)]
            self._products = [_zeros(shape, self._origin.device, self._scratch) for shape in shapes]
        self._join()
        if self.products == "float32" and all(layer[0].dtype in HALF_DTYPES for layer in self._buffer if layer):
            for start in range(0, self._buffered, _FLOAT32_TOKENS):
                self._fold_half([layer[0][start : start + _FLOAT32_TOKENS] for layer in self._buffer])
        else:
            for block in self._rows(self._fold_rows):
                mean = block.mean(dim=0)
                block -= mean
                self._add_products(block)
                self._add_products(self._combined_mean(mean, len(block))[None])
        for layer in self._buffer:
            layer.clear()
        self._buffered = 0

    def _fold_half(self, states: Sequence[torch.Tensor]) -> None:
        """Folds half-precision states: see :mod:`clp_ros.calibration.half_products`."""
        noise = half_products.noise(len(states[0]), self._folded, self._origin.device)
        parts: list[half_products.DitheredState] = []
        # The layers are side by side as in _partners, but only those multiplied with each other are in memory at a
        # time.
        for i, products in enumerate(self._products):
            for j, columns in enumerate(self._columns):
                at = columns.start - self._columns[i].start
                if not 0 <= at < products.shape[1]:
                    continue
                if j == len(parts):
                    parts.append(half_products.dither(states[j], self._origin[columns], noise))
                sums = products[:, at : at + columns.stop - columns.start]
                half_products.add_products(
                    sums, parts[i], parts[j], self._block_rows(i) if i == j else [slice(0, None)]
                )
            parts[i].state = parts[i].heavy_state = torch.empty(0)
        mean, more, less = half_products.without_noise(parts, noise)
        self._add_products(more[None])
        self._add_products(less[None], factor=-1)
        self._add_products(self._combined_mean(mean, len(states[0]))[None])

    def _gram_alignment(self) -> torch.Tensor:
        """Returns ``||X_i'X_j||_F^2`` of the buffered tokens as inner products of Gram matrices: (L, L) float64."""
        mean = sum(block.sum(dim=0) for block in self._rows(_GRAM_ROWS)) / self._buffered
        alignment = torch.zeros(self.num_layers, self.num_layers, dtype=torch.float64, device=self._device)
        for first in range(0, self._buffered, _GRAM_ROWS):
            left = None
            for right in self._rows(_GRAM_ROWS, first):
                right -= mean
                twice = left is not None  # a block off the diagonal also counts for its mirror image
                left = right if left is None else left
                grams = torch.stack([left[:, c] @ right[:, c].T for c in self._columns]).flatten(1)
                alignment += (2 if twice else 1) * (grams @ grams.T)
        return alignment

    def _product_alignment(self) -> torch.Tensor:
        """Returns ``||X_i'X_j||_F^2`` of the folded tokens: (L, L) float64, zero for pairs that are not computed."""
        alignment = torch.zeros(self.num_layers, self.num_layers, dtype=torch.float64, device=self._device)
        for i, products in enumerate(self._products):
            partners = self._partners(i)
            for j, columns in enumerate(self._columns):
                if partners.start <= columns.start < partners.stop:
                    part = products[:, columns.start - partners.start : columns.stop - partners.start]
                    if i == j:
                        alignment[i, i] = sum(
                            2 * torch.linalg.vector_norm(part[rows, rows.start :]) ** 2
                            - torch.linalg.vector_norm(part[rows, rows]) ** 2
                            for rows in self._block_rows(i)
                        )
                    else:
                        alignment[i, j] = alignment[j, i] = torch.linalg.vector_norm(part) ** 2
        return alignment

    @torch.no_grad()
    def _similarity(self) -> np.ndarray:
        if self.tokens < 2:
            raise ClpError(
                f"CKA needs two tokens or more, not {self.tokens}", where=self.name or None, hint="use more samples"
            )
        if not self._products:
            alignment = self._gram_alignment().cpu().numpy()
        else:
            self._fold()
            alignment = self._product_alignment().cpu().numpy()
        if not np.isfinite(alignment).all():
            raise ClpError(
                "the hidden states are too large for float64 sums",
                where=self.name or None,
                hint="check the checkpoint's weights",
            )
        norms = np.sqrt(np.diagonal(alignment))
        constant = norms == 0
        norms[constant] = 1
        similarity = np.minimum(alignment / norms[:, None] / norms, 1)
        similarity[np.ix_(constant, constant)] = 1
        upper = np.triu(similarity, 1)
        return upper + upper.T + np.eye(self.num_layers)


def _zeros(shape: tuple[int, int], device: torch.device, scratch: str | Path | None) -> torch.Tensor:
    """Returns a float64 tensor of zeros, in memory or in an unnamed file under ``scratch``."""
    if scratch is None:
        return torch.zeros(shape, dtype=torch.float64, device=device)
    if device.type != "cpu":
        raise ValueError(f"scratch is for sums on the CPU, not on {device}")
    # The mapping stays valid after the file's name is removed, so that no file remains, however the process ends.
    with tempfile.NamedTemporaryFile(dir=scratch) as file:
        flat = torch.from_file(file.name, shared=True, size=shape[0] * shape[1], dtype=torch.float64)
    return flat.view(shape)
