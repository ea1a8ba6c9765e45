# SPDX-License-Identifier: Apache-2.0
"""Cross products of half-precision hidden states, computed in float32, with nearly the accuracy of float64 for CKA.

Three things keep a CKA score within 1e-7 of float64's. Measured on random states, each alone is not enough.

- The products are full float32 products. Where hardware rounds their factors to bfloat16 or TF32 first, every square
  gets an error that is never negative, and a score moves by 1e-6 to 1e-5. Splitting each factor into two bfloat16
  parts and summing three products leaves 1e-6.
- Noise is added to the states and subtracted from the sums (dither). Half-precision states far from zero have few
distinct values, and a sum of equal products repeats one rounding error thousands of times: up to 1e-6.
- Heavy features are kept and multiplied with each other in float64. If few features have most of the variance (massive
activations), the error of a score is that of a few sums, or of the rounding of a single token. Otherwise the errors of
thousands of sums cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Number of products summed in float32. CPU libraries sum them in blocks of some hundred, GPU libraries one by one.
_SUMMED = {"cpu": 4096}
_SUMMED_ELSEWHERE = 512
_CHUNK = 128  # tokens whose float64 copies stay in a cache
_DITHER = 0.25  # standard deviation of the noise, relative to that of the feature
# A feature is heavy if its sum of squares has at least this share of the norm of all features' sums of squares. Two
# features with shares a and b contribute at most 2ab to the squared norms of a score. A float32 sum of their products
# has an error of up to 1e-6 if one token dominates the sum.
_HEAVY = 1 / 64
_MOST_HEAVY = 64  # only the heaviest are used if more reach that share, as in states of few features


@dataclass
class DitheredState:
    """A layer's centred state with noise.

    Attributes:
        state: (tokens, dim) float32; empty after the last product that needs it.
        heavy: Indices of the heavy features.
        heavy_state: (tokens, heavy features) float64: columns of ``state`` before rounding.
        mean: (dim,) float64, relative to the origin.
        scale: (dim,) float64, scale of the noise.
        along: (dim,) float64, the sum of the tokens of ``state``, weighted with the noise.
    """

    state: torch.Tensor
    heavy: torch.Tensor
    heavy_state: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    along: torch.Tensor


def noise(tokens: int, seed: int, device: torch.device) -> torch.Tensor:
    """Returns the noise of each token: (tokens,) float64, the same on every machine."""
    return torch.randn(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def dither(state: torch.Tensor, origin: torch.Tensor, noise: torch.Tensor) -> DitheredState:
    """Centres a state in float64, so that a large mean costs no precision, and adds noise.

    All features of a token get the same noise in proportion to their standard deviations. A constant feature becomes
    exactly zero.

    Args:
        state: (tokens, dim), in half precision.
        origin: (dim,) float64; one of the tokens.
        noise: (tokens,) float64.
    """
    total, squares, along = torch.zeros(3, len(origin), dtype=torch.float64, device=state.device)
    for chunk in state.split(_CHUNK):
        wide = chunk - origin
        total += wide.sum(dim=0)
        squares += wide.square_().sum(dim=0)
    mean = total / len(state)
    squares = (squares - total * mean).clamp_(min=0)
    scale = _DITHER * (squares / len(state)).sqrt()
    largest, heavy = squares.topk(min(_MOST_HEAVY, len(squares)))
    heavy = heavy[(largest >= _HEAVY * torch.linalg.vector_norm(squares)) & (largest > 0)]
    result = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    exact = []
    for rows, chunk, its in zip(result.split(_CHUNK), state.split(_CHUNK), noise.split(_CHUNK), strict=True):
        wide = chunk - origin
        wide -= mean
        rows.copy_(wide.addr_(its, scale))
        exact.append(wide[:, heavy])
        along += its @ rows.double()
    heavy_state = torch.cat(exact)
    along[heavy] = noise @ heavy_state
    return DitheredState(result, heavy, heavy_state, mean, scale, along)


def add_products(sums: torch.Tensor, left: DitheredState, right: DitheredState, blocks: Iterable[slice]) -> None:
    """Adds ``left.state.T @ right.state``.

    Args:
        sums: (dim of the left, dim of the right) float64; added to.
        left: A layer.
        right: A layer.
        blocks: Blocks of rows of ``sums``. In each block, only the columns from the index of its first row on are
            defined.
    """
    exact = left.heavy[:, None], right.heavy
    expected = sums[exact].addmm_(left.heavy_state.T, right.heavy_state)
    tokens = _SUMMED.get(sums.device.type, _SUMMED_ELSEWHERE)
    with full_products():
        for rows in blocks:
            for ones, others in zip(left.state.split(tokens), right.state.split(tokens), strict=True):
                sums[rows, rows.start :] += ones[:, rows].T @ others[:, rows.start :]
    sums[exact] = expected


def without_noise(
    parts: Sequence[DitheredState], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the terms that remove the noise from the products.

    With w the noise, v its scale and a = A'w, where A = X + wv' is dithered:
    X'X = A'A + |w|^2 (v - a / |w|^2) (v - a / |w|^2)' - a a' / |w|^2.

    Returns:
        Three float64 rows of all layers side by side: the mean, the row whose outer product is added, and the row whose
        outer product is subtracted.
    """
    mean, scale, along = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "scale", "along"))
    power = noise.square().sum()
    return mean, power.sqrt() * (scale - along / power), along / power.sqrt()


@contextmanager
def full_products() -> Iterator[None]:
    """Multiplies float32 matrices in full precision in the block, even if other code has allowed faster products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
