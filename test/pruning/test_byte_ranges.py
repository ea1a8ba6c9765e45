# SPDX-License-Identifier: Apache-2.0
"""Copying byte ranges: every way gives the same bytes."""

import os
import random
from pathlib import Path

import pytest
import torch

from clp_ros.core.errors import ClpError
from clp_ros.pruning.byte_ranges import Cut, RangeCopier, reserve

RANGES = [(4, 5_000_004), (70_000, 70_001), (99_000, 99_000), (50, 60), (6_000_000, 9_000_001), (4_111, 8_000_001)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(0).randbytes(9_000_001))
    return path


def _copied(source: Path, target: Path) -> tuple[bytes, list[int]]:
    steps: list[int] = []
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        writer.write(b"head")
        copier = RangeCopier(writer.fileno(), steps.append)
        for start, end in RANGES:
            copier.append(reader.fileno(), start, end, source)
    return target.read_bytes(), steps


def test_ranges_are_copied_one_behind_the_other(source: Path, tmp_path: Path):
    content = source.read_bytes()
    expected = b"head" + b"".join(content[start:end] for start, end in RANGES)
    copied, steps = _copied(source, tmp_path / "target")
    assert copied == expected
    assert sum(steps) == len(expected) - 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("chunk", [None, 100])
def test_a_slice_is_what_torch_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dimension: int, chunk: int | None
):
    if chunk is not None:  # a tensor of several blocks
        monkeypatch.setattr("clp_ros.pruning.byte_ranges._CHUNK", chunk)
    rng = torch.Generator().manual_seed(dimension)
    tensor = torch.randn(7, 12, 5, generator=rng).mul(50).to(dtype)
    for shape in (tensor.shape[dimension], 1, 3):
        kept = sorted(torch.randperm(tensor.shape[dimension], generator=rng)[:shape].tolist())
        (tmp_path / "source").write_bytes(b"head" + tensor.view(torch.uint8).numpy().tobytes())
        size = tensor.element_size()
        before, after = tensor.shape[:dimension].numel(), tensor.shape[dimension + 1 :].numel()
        cut = Cut(before, tensor.shape[dimension], after * size, tuple(kept))
        steps: list[int] = []
        with (tmp_path / "source").open("rb") as reader, (tmp_path / "target").open("wb", buffering=0) as writer:
            RangeCopier(writer.fileno(), steps.append).append_slice(reader.fileno(), 4, cut, tmp_path)
        expected = tensor.index_select(dimension, torch.tensor(kept)).contiguous().view(torch.uint8).numpy().tobytes()
        assert (tmp_path / "target").read_bytes() == expected
        assert sum(steps) == cut.nbytes == len(expected)


def test_a_source_that_ends_too_early_is_an_error(source: Path, tmp_path: Path):
    os.truncate(source, 8_000_000)
    with pytest.raises(ClpError, match="became shorter"):
        _copied(source, tmp_path / "target")
    for cut in (Cut(2, 500_000, 10, (1,)), Cut(1, 10, 1_000_000, (9,))):
        with source.open("rb") as reader, (tmp_path / "target").open("wb", buffering=0) as writer:
            copier = RangeCopier(writer.fileno())
            with pytest.raises(ClpError, match="became shorter"):
                copier.append_slice(reader.fileno(), 0, cut, source)


def test_a_target_that_cannot_be_written_is_an_error(source: Path, tmp_path: Path):
    (tmp_path / "target").write_bytes(b"")
    with (
        source.open("rb") as reader,
        (tmp_path / "target").open("rb") as read_only,
        pytest.raises(OSError, match="Bad file"),
    ):
        RangeCopier(read_only.fileno()).append(reader.fileno(), 0, 10, source)


def test_reserved_blocks_are_there_before_anything_is_written(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file:
        reserve(file.fileno(), 1_000_000)
        file.write(b"begins at the start")
    found = (tmp_path / "file").stat()
    assert found.st_size == 1_000_000
    assert (tmp_path / "file").read_bytes().startswith(b"begins at the start\0")


def test_more_than_the_disk_holds_cannot_be_reserved(tmp_path):
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=r"[Nn]o space|too large"):
        reserve(file.fileno(), 1 << 60)
