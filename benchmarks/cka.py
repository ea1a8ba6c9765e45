# SPDX-License-Identifier: Apache-2.0
"""Compares clp_ros' all-pairs CKA of a layer stack with new Gram matrices for each pair, as in PyPI's torch-cka.

    python benchmarks/cka.py [--layers 16] [--tokens 4096] [--dim 960] [--pairs 2]

The slow methods are timed on ``--pairs`` pairs, and their time is scaled to all pairs. If torch-cka is installed, its
``_HSIC`` is called, otherwise the same formula. A faster variant is measured too: each unordered pair once, two Gram
matrices and their inner product, without torch-cka's n x n x n matrix product.

    python benchmarks/cka.py --half [--tokens 4096] [--dim 2048]

Compares the ways to multiply bfloat16 states for the scores of adjacent layers: processor seconds and errors.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from results import Table, add_output_argument, write_results

from clp_ros.calibration.similarity import LinearCKA
from clp_ros.core.compat.torch import multiplies_bfloat16

FRAME_TOKENS = 241  # of one SmolVLA frame: 3 cameras x 64, 48 of language, 1 of state


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=960)
    parser.add_argument("--pairs", type=int, default=2, help="number of pairs on which the slow methods are timed")
    parser.add_argument("--half", action="store_true", help="compare the ways to multiply states in half precision")
    add_output_argument(parser)
    args = parser.parse_args()
    if args.half:
        write_results(args.output, [half_precision(args.tokens, args.dim)])
        return

    states = residual_stream(args.layers, args.tokens, args.dim)
    hsic, source = torch_cka_hsic()
    ordered, unordered = args.layers**2, args.layers * (args.layers + 1) // 2
    rows = []

    (matrix, held), ours, peak = measured(lambda: streamed(states, "all"))
    rows.append(("clp_ros LinearCKA, all pairs", ours, f"{held / 2**20:.0f}", peak, "measured"))
    (adjacent, held), seconds, peak = measured(lambda: streamed(states, "adjacent"))
    rows.append(("clp_ros LinearCKA, adjacent pairs", seconds, f"{held / 2**20:.0f}", peak, "measured"))
    (_, held), seconds, peak = measured(lambda: streamed(states, "all", buffer_bytes=0))
    rows.append(("clp_ros LinearCKA, all pairs, folded", seconds, f"{held / 2**20:.0f}", peak, "measured"))
    scale = f"{args.pairs} pairs timed, x {{:g}}"
    factor = unordered / args.pairs
    _, seconds, peak = measured(lambda: [gram_pair(states[0], y) for y in states[1 : 1 + args.pairs]])
    rival = seconds * factor
    rows.append((f"two Gram matrices for each of {unordered} pairs", rival, "-", peak, scale.format(factor)))
    factor = ordered / args.pairs
    row = states[0] @ states[0].T  # computed once for each row of the matrix, so not timed
    _, seconds, peak = measured(lambda: [torch_cka_pair(hsic, row, y) for y in states[1 : 1 + args.pairs]])
    slow = seconds * factor
    rows.append((f"torch-cka's way, {ordered} pairs", slow, "-", peak, scale.format(factor)))

    print(f"{args.layers} layers x {args.tokens} tokens x {args.dim}, float32, {torch.get_num_threads()} threads")
    print(f"torch-cka's HSIC: {source}")
    print(f"{'':44}{'seconds':>9}{'ratio':>8}{'held MiB':>10}{'peak RSS +MiB':>15}")
    for name, seconds, held, peak, how in rows:
        print(f"{name:44}{seconds:9.2f}{seconds / ours:7.1f}x{held:>10}{peak:15.0f}  {how}")
    record = Table("way", {"time": "s", "time / ours": None, "held": "MiB", "peak": "MiB"})
    for name, seconds, held, peak, _ in rows:
        kept = None if held == "-" else int(held)
        record.rows[name] = {"time": seconds, "time / ours": seconds / ours, "held": kept, "peak": peak}
    write_results(args.output, [record])
    print(f"ours is {slow / ours:.1f} times as fast as torch-cka's way, {rival / ours:.1f} times as the better rival")
    exact = [cka_float64(x, y) for x, y in itertools.pairwise(states)]
    for name, scores in (("all pairs", np.diagonal(matrix, 1)), ("adjacent", np.diagonal(adjacent, 1))):
        print(f"largest error of {name} against the float64 formula: {np.abs(scores - exact).max():.1e}")


def half_precision(tokens: int, dim: int) -> Table:
    """Compares the ways to multiply states in half precision, prints it and returns it."""
    generator = torch.Generator().manual_seed(0)
    stream = [torch.randn(tokens, dim, generator=generator)]
    stream.append(stream[0] + 0.3 * torch.randn(tokens, dim, generator=generator))
    states = [(state + 3).to(torch.bfloat16) for state in stream]
    exact = cka_float64(*states)
    ways = {
        "clp_ros, float64": lambda: folded(states, "float64"),
        "clp_ros, float32": lambda: folded(states, "float32"),
        "one product of bfloat16": lambda: split(states, parts=1),
        "three of two bfloat16 parts": lambda: split(states, parts=2),
    }
    print(f"2 layers x {tokens} tokens x {dim}, bfloat16, {torch.get_num_threads()} threads")
    print(f"torch's bfloat16 products on this processor: {multiplies_bfloat16()}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    record = Table("products", {"processor time": "s", "time / float64": None, "error": None})
    for _ in range(5):  # in turns
        for name, way in ways.items():
            start = time.process_time()
            score = way()
            seconds[name].append(time.process_time() - start)
            if len(seconds[name]) == 5:
                least, base = min(seconds[name]), min(seconds["clp_ros, float64"])
                print(f"{name:30}{least:8.2f} s{least / base:6.2f}x  error {abs(score - exact):.0e}")
                record.rows[name] = {
                    "processor time": least,
                    "time / float64": least / base,
                    "error": f"{abs(score - exact):.0e}",
                }
    return record


def folded(states: list[torch.Tensor], products: str) -> float:
    """Returns clp_ros' scores with all tokens folded at once."""
    cka = LinearCKA(len(states), pairs="adjacent", products=products, buffer_bytes=0)
    cka.update(states)
    return float(cka.adjacent()[0])


def split(states: list[torch.Tensor], parts: int) -> float:
    """Multiplies bfloat16 numbers and sums in float32, as fast as PyTorch can on this processor."""
    halves = []
    for state in states:
        centred = (state.double() - state.double().mean(dim=0)).float()
        high = centred.to(torch.bfloat16).float()
        halves.append((high, (centred - high).to(torch.bfloat16).float())[:parts])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # uses bfloat16 products if the hardware has them
    try:
        sums = []
        for x, y in ((0, 0), (0, 1), (1, 1)):
            product = halves[x][0].T @ halves[y][0]
            if parts > 1:
                product += halves[x][0].T @ halves[y][1] + halves[x][1].T @ halves[y][0]
            sums.append(product.double().norm() ** 2)
    finally:
        torch.set_float32_matmul_precision(before)
    return (sums[1] / (sums[0] * sums[2]).sqrt()).item()


def residual_stream(layers: int, tokens: int, dim: int) -> list[torch.Tensor]:
    """Returns states that resemble those of the layer before, with two channels and one token of large values."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(tokens, dim, generator=generator)
    state[:, :2] += 1000
    state[0, :4] = 5000
    states = [state]
    for _ in range(layers - 1):
        states.append(states[-1] + 0.3 * torch.randn(tokens, dim, generator=generator))
    return states


def streamed(states: list[torch.Tensor], pairs: str, **options: int) -> tuple[np.ndarray, int]:
    """Returns clp_ros' scores of frame by frame updates, as in a calibration, and the bytes held before the end."""
    cka = LinearCKA(len(states), pairs=pairs, **options)
    for frame in zip(*(state.split(FRAME_TOKENS) for state in states), strict=True):
        cka.update(frame)
    held = cka.held_bytes
    return (cka.matrix() if pairs == "all" else np.diag(cka.adjacent(), 1)), held


def torch_cka_hsic() -> tuple[Callable[[torch.Tensor, torch.Tensor], float], str]:
    """Returns torch-cka's unbiased HSIC, from the package if it is installed."""
    try:
        from torch_cka import CKA
    except ImportError:
        return unbiased_hsic, "the same formula (torch_cka is not installed)"
    return (lambda k, l: CKA._HSIC(SimpleNamespace(device="cpu"), k, l)), "torch_cka.CKA._HSIC"  # noqa: E741


def unbiased_hsic(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """Computes the same as torch-cka 0.21, including a full matrix product."""
    n = len(k)
    ones = torch.ones(n, 1)
    result = torch.trace(k @ l)
    result += ((ones.T @ k @ ones @ ones.T @ l @ ones) / ((n - 1) * (n - 2))).item()
    result -= ((ones.T @ k @ l @ ones) * 2 / (n - 2)).item()
    return (result / (n * (n - 3))).item()


def torch_cka_pair(hsic: Callable[[torch.Tensor, torch.Tensor], float], row: torch.Tensor, y: torch.Tensor) -> None:
    """Computes the same as torch-cka 0.21's ``compare`` for one pair of layers."""
    column = (y @ y.T).fill_diagonal_(0)
    hsic(row, column)
    hsic(column, column)


def gram_pair(x: torch.Tensor, y: torch.Tensor) -> float:
    """CKA from two Gram matrices of centred states and inner products of them."""
    k, l = ((z - z.mean(dim=0)) @ (z - z.mean(dim=0)).T for z in (x, y))  # noqa: E741
    return ((k * l).sum() / (k.norm() * l.norm())).item()


def cka_float64(x: torch.Tensor, y: torch.Tensor) -> float:
    """CKA by its definition, in float64."""
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def measured[T](work: Callable[[], T]) -> tuple[T, float, float]:
    """Returns the result of the work, its seconds, and the growth of peak resident memory in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, resident("VmHWM") - before


def resident(field: str) -> float:
    """A field of this process's status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
