# SPDX-License-Identifier: Apache-2.0
"""Lists the files of a checkpoint folder, and reads the headers of its weights."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

from clp_ros.checkpoints.safetensors_header import TensorInfo, read_header
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"  # the one file stock lerobot loads
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "clp.json"
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")

_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# Version control and download records: not part of the checkpoint, and wrong for a copy of it.
_IGNORED_FOLDERS = {".git", ".cache"}

# Device, inode, size, and time of the last change in nanoseconds: equal only for one file with one content.
type FileStamp = tuple[int, int, int, int]


def file_stamp(file: Path | int) -> FileStamp:
    """Returns the stamp of a path or of an open descriptor."""
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def list_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yields every file's path relative to the folder, with ``/``, and its size."""
    for current, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS)
        real = Path(current).resolve()
        for name in folders:
            if real.is_relative_to(Path(current, name).resolve()):
                raise ClpError("the link leads back to a folder around it", where=Path(current, name), hint="remove it")
        for name in names:
            path = Path(current, name)
            if path.is_symlink() and not path.exists():
                raise ClpError("the link leads nowhere", where=path, hint="copy the checkpoint again, with the file")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
                raise ClpError("neither a file nor a folder", where=path, hint="remove it")
            yield path.relative_to(folder).as_posix(), status.st_size


def _raise(error: OSError) -> None:
    raise error


def read_weights(
    folder: Path, files: Mapping[str, int]
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, FileStamp]]:
    """Reads the headers of all weight files, and compares them with the index, if there is one.

    Returns:
        The tensors, the metadata, and the stamps by name of the weight file.
    """
    index = _read_index(folder / INDEX_FILE) if INDEX_FILE in files else None
    if index is None and WEIGHTS_FILE not in files:
        raise ClpError(
            f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            where=folder,
            hint="give a complete copy of the checkpoint",
        )
    names = tuple(sorted(set(index.values()))) if index is not None else (WEIGHTS_FILE,)
    for name in names:
        if name not in files:
            raise ClpError(f"the shard {name} is missing", where=folder, hint="give a complete copy of the checkpoint")
    for name in files:
        if (name == WEIGHTS_FILE or _SHARD_NAME.fullmatch(name)) and name not in names:
            raise ClpError(
                "more weights than the index names: which ones count is unclear" if index is not None
                else "a shard without an index",
                where=folder / name,
                hint="keep either the single file, or the index and its shards",
            )  # fmt: skip
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    stamps = {}
    for name in names:
        stamps[name] = file_stamp(folder / name)
        found, notes = read_header(folder / name)
        for tensor in found:
            if tensor in tensors:
                raise ClpError(
                    f"tensor {tensor} is in {tensors[tensor].file} too",
                    where=folder / name,
                    hint="give the shards of one checkpoint only",
                )
            if index is not None and index.get(tensor) != name:
                raise ClpError(
                    f"tensor {tensor} is not where the index says ({index.get(tensor, 'nowhere')})",
                    where=folder / name,
                    hint="give the index that was saved with these shards",
                )
        for key, value in notes.items():
            if metadata.setdefault(key, value) != value:
                raise ClpError(
                    f"__metadata__ {key!r} differs from another shard's",
                    where=folder / name,
                    hint="give the shards of one checkpoint only",
                )
        tensors |= found
    if index is not None and (absent := sorted(index.keys() - tensors.keys())):
        raise ClpError(
            f"the index names {absent[0]} in {index[absent[0]]}, which lacks it",
            where=folder / INDEX_FILE,
            hint="give the index that was saved with these shards",
        )
    return tensors, metadata, stamps


def _read_index(path: Path) -> dict[str, str]:
    hint = "give an undamaged copy of the index"
    weight_map = read_json_object(path, hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ClpError("weight_map is not an object of tensor and file names", where=path, hint=hint)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise ClpError(f"weight_map puts {tensor} into {name!r}, no plain file name", where=path, hint=hint)
        if not name.endswith(".safetensors"):
            raise ClpError(f"weight_map puts {tensor} into {name!r}, no safetensors file", where=path, hint=hint)
    return weight_map


def _is_plain_name(name: str) -> bool:
    # Also under Windows' rules: "C:model.safetensors" and "a\b" are paths there.
    return name.isprintable() and name not in {"", ".", ".."} and PureWindowsPath(name).name == name == Path(name).name
