# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the header of a safetensors file without the data.

Surgery copies byte ranges and needs the tensors' offsets, which the safetensors library does not give. The library
checks the header. Further checks here are for repeated names, unknown fields, and names that look like paths. Format: 8
bytes little-endian header length, a JSON header, the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError
from clp_ros.core.files import refuse_lfs_pointer
from clp_ros.core.json_object import parse_json_object

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's limit
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_HINT = "give an undamaged copy of the file"

# Bits an element takes, by safetensors' dtype names (safetensors 0.8).
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """The position of one tensor in its file.

    Attributes:
        file: Name of its file, relative to the checkpoint folder.
        dtype: safetensors' name of the dtype, e.g. ``BF16``.
        shape: Its shape.
        start: Offset of its first byte in the file.
        end: Offset after its last byte in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of a safetensors file.

    Args:
        path: The file. :attr:`TensorInfo.file` is its name.

    Returns:
        The tensors by name, in the order of their bytes, and the ``__metadata__`` strings.

    Raises:
        ClpError: The header or the file's size does not conform to the format.
        OSError: The file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ClpError("not a regular file", where=path, hint=_HINT)
    size = status.st_size
    with path.open("rb") as file:
        length_field = file.read(_LENGTH_BYTES)
        if len(length_field) < _LENGTH_BYTES:
            raise ClpError(f"the file is truncated: {size} bytes are too few for a header", where=path, hint=_HINT)
        refuse_lfs_pointer(length_field, path)
        length = int.from_bytes(length_field, "little")
        if length > MAX_HEADER_BYTES:
            raise ClpError(f"the header has {length} bytes, more than {MAX_HEADER_BYTES}", where=path, hint=_HINT)
        data_start = _LENGTH_BYTES + length
        if data_start > size:
            raise ClpError(f"the file is truncated: it has {size} bytes, its header {length}", where=path, hint=_HINT)
        header = parse_json_object(file.read(length), f"header of {path}", _HINT)

    metadata = header.pop(_METADATA, None) or {}
    _check_by_library(path, header, data_start, size)
    tensors = {name: _tensor(name, entry, data_start, path) for name, entry in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))), metadata


def encode_header(tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Encodes the header of a file with these tensors, without gaps between them.

    Args:
        tensors: Names and tensors in the order of their bytes; only dtype, shape and size are used.
        metadata: The ``__metadata__`` strings; if empty, the key is not written.

    Returns:
        Length and header, padded with blanks to a multiple of 8 bytes, as the format requires.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in tensors:
        end = position + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _check_by_library(path: Path, header: Mapping[str, Any], data_start: int, size: int) -> None:
    """Checks types, names of dtypes, sizes, and that there are no gaps, with the safetensors library.

    Raises:
        ClpError: The library refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        what = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in what:  # only the end of the file is wrong
            spare = size - data_start - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            what = f"{spare} bytes belong to no tensor" if spare > 0 else f"the file is truncated by {-spare} bytes"
        raise ClpError(what, where=path, hint=_HINT) from error


def _tensor(name: str, entry: Mapping[str, Any], data_start: int, path: Path) -> TensorInfo:
    if not name or "/" in name or "\\" in name or ".." in name or not name.isprintable():
        raise ClpError(f"the tensor name {_short(name)} looks like a path or is not text", where=path, hint=_HINT)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ClpError(f"tensor {name} has more fields than dtype, shape and data_offsets", where=path, hint=_HINT)
    start, end = entry["data_offsets"]
    return TensorInfo(path.name, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + end)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
