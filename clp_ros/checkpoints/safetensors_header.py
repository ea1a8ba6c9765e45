# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read and written without its data.

The safetensors library hands out tensors, not where their bytes lie; surgery copies byte ranges, so it needs the
offsets. The checks are those of the library's own reader, and some it leaves out (repeated names, names that look like
paths). Format: 8 bytes little-endian header length, a JSON header, the tensors' bytes without gaps.
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

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIX = "give an undamaged copy of the file"

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
    """Where one tensor lies.

    Attributes:
        file: Name of its file, relative to the checkpoint folder.
        dtype: safetensors' name of the dtype, e.g. ``BF16``.
        shape: Its shape.
        start: Offset of its first byte in the file.
        end: Offset behind its last byte in the file.
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
    def bytes(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of a safetensors file.

    Args:
        path: The file. :attr:`TensorInfo.file` is its name.

    Returns:
        The tensors by name, in the order of their bytes, and the ``__metadata__`` strings.

    Raises:
        ClpError: Anything in the header, or the file's size, is not as the format wants it.
        OSError: The file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ClpError("not a regular file", where=path, fix=_FIX)
    size = status.st_size
    with path.open("rb") as file:
        length_field = file.read(_LENGTH_BYTES)
        if len(length_field) < _LENGTH_BYTES:
            raise ClpError(f"the file is truncated: {size} bytes hold no header length", where=path, fix=_FIX)
        refuse_lfs_pointer(length_field, path)
        length = int.from_bytes(length_field, "little")
        if length > MAX_HEADER_BYTES:
            raise ClpError(f"the header claims {length} bytes, above {MAX_HEADER_BYTES}", where=path, fix=_FIX)
        data_start = _LENGTH_BYTES + length
        if data_start > size:
            raise ClpError(f"the file is truncated: {size} bytes hold no header of {length}", where=path, fix=_FIX)
        header = parse_json_object(file.read(length), f"header of {path}", _FIX)

    metadata = _checked_metadata(header.pop(_METADATA, None), path)
    tensors = {name: _checked_tensor(name, entry, data_start, path) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    if beyond := [name for name, tensor in tensors.items() if tensor.end > size]:
        missing = tensors[beyond[-1]].end - size
        raise ClpError(f"the file is truncated: {beyond[-1]} ends {missing} bytes behind it", where=path, fix=_FIX)
    position, previous = data_start, "the header"
    for name, tensor in tensors.items():
        if tensor.start != position:
            fault = "overlaps" if tensor.start < position else "leaves a hole behind"
            raise ClpError(f"tensor {name} {fault} {previous}", where=path, fix=_FIX)
        position, previous = tensor.end, name
    if position != size:
        raise ClpError(f"{size - position} bytes belong to no tensor", where=path, fix=_FIX)
    return tensors, metadata


def encode_header(
    tensors: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str], alignment: int = 8, shift: int = 0
) -> bytes:
    """Encodes the header of a file that holds these tensors one behind the other.

    Args:
        tensors: Names and tensors in the order of their bytes; only dtype, shape and size are used.
        metadata: The ``__metadata__`` strings; none are written where it is empty.
        alignment: The data starts at a multiple of so many bytes (safetensors pads to 8, and wants it so) ...
        shift: ... and so many more.

    Returns:
        Length and header, padded with blanks.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in tensors:
        end = position + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((shift - _LENGTH_BYTES - len(text)) % alignment)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _checked_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ClpError(f"{_METADATA} is not an object of strings", where=path, fix=_FIX)
    for text in (*metadata, *metadata.values()):
        _check_unicode(text, path)
    return metadata


def _checked_tensor(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    _check_name(name, path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ClpError(f"tensor {name} is not described by dtype, shape and data_offsets", where=path, fix=_FIX)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ClpError(
            f"tensor {name} has the unknown dtype {dtype!r}", where=path, fix=f"use one of {', '.join(DTYPE_BITS)}"
        )
    if not _are_sizes(shape):
        raise ClpError(f"tensor {name} has the impossible shape {_short(shape)}", where=path, fix=_FIX)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ClpError(f"tensor {name} has the impossible data_offsets {_short(offsets)}", where=path, fix=_FIX)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise ClpError(
            f"tensor {name} spans {offsets[1] - offsets[0]} bytes, but {_short(shape)} of {dtype} is another size",
            where=path,
            fix=_FIX,
        )
    return TensorInfo(path.name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> bool:
    # bool is an int to Python but not to the format; no size of a real file needs more than 64 bits, and a tensor no
    # more than torch's 64 dimensions (so that the product of a hostile shape stays cheap).
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_name(name: str, path: Path) -> None:
    if not name or "/" in name or "\\" in name or ".." in name or not name.isprintable():
        raise ClpError(f"the tensor name {_short(name)} looks like a path or is no text", where=path, fix=_FIX)


def _check_unicode(text: str, path: Path) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, UTF-8 cannot
        raise ClpError(f"{_METADATA} holds invalid Unicode", where=path, fix=_FIX) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
