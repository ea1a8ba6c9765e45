# SPDX-License-Identifier: Apache-2.0
"""Task heads: the tensors and files in which a fine-tuned checkpoint differs from its base, apart and back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from clp_ros.checkpoints.folder import INDEX_FILE, WEIGHTS_FILE
from clp_ros.checkpoints.safetensors_header import TensorInfo, encode_header, read_header
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, check_apart, rewrite_json
from clp_ros.core.json_object import read_json_object
from clp_ros.core.strict_model import StrictModel, describe, place
from clp_ros.policies.checkpoint import Checkpoint

HEAD_FILE, TENSORS_FILE, FILES_FOLDER = "head.json", "head.safetensors", "files"
SCHEMA_VERSION = 1
_CHUNK = 16 << 20

_Count = Annotated[int, Field(ge=0)]


class Base(StrictModel):
    """The base of a head: its ``path`` when the head was made, and its ``fingerprint``."""

    path: str
    fingerprint: str


class Head(StrictModel):
    """``head.json``.

    Attributes:
        schema_version: 1.
        family: The family of base and fine-tuned checkpoint.
        base: The base.
        fingerprint: The fingerprint of the fine-tuned checkpoint.
        parameters: Number of values in the tensors that differ; ``total``: in all tensors.
        names: The stored name of each tensor that differs, by its name in lerobot's model.
        header: The header of the fine-tuned checkpoint's weights: tensors, in order, and metadata.
        sha256: Hash of its weights file.
        absent: The base's files that the fine-tuned checkpoint does not have.
    """

    schema_version: int
    family: str
    base: Base
    fingerprint: str
    parameters: _Count
    total: _Count
    names: dict[str, str]
    header: str
    sha256: str
    absent: list[str]


def read_head(folder: Path) -> Head:
    """Reads and checks ``head.json``.

    Raises:
        ClpError: The folder is not a head.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        raise ClpError(f"there is no {HEAD_FILE}", where=folder, hint="give a folder that `clp head extract` wrote")
    document = read_json_object(path)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ClpError(
            f"the head has schema version {document.get('schema_version')!r}, not {SCHEMA_VERSION}",
            where=path,
            hint="extract it again",
        )
    try:
        return Head.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ClpError(f"{place(fault)} {describe(fault)}".strip(), where=path, hint="extract it again") from error


def check_base(head: Head, base: Checkpoint, where: object) -> None:
    """Refuses a head of another base.

    Raises:
        ClpError: The fingerprints differ.
    """
    if base.fingerprint() != head.base.fingerprint:
        raise ClpError(
            f"the head belongs to another base: to {head.base.path}, not to {base.path}",
            where=where,
            hint="give the checkpoint from which the fine-tuning started",
        )


def extract_head(base: str | Path, finetuned: str | Path, output: str | Path, overwrite: bool = False) -> Head:
    """Writes the difference of a fine-tuned checkpoint from its base.

    Args:
        base: The checkpoint from which the fine-tuning started.
        finetuned: The fine-tuned checkpoint.
        output: The folder to write.
        overwrite: Whether a folder that is not empty is replaced.

    Returns:
        What ``head.json`` says.

    Raises:
        ClpError: The two have other tensors or families, or the output folder cannot be written.
    """
    old, new = Checkpoint.open(base), Checkpoint.open(finetuned)
    target = Path(output)
    check_apart(target, [old.path, new.path])
    if WEIGHTS_FILE not in new.files:
        raise ClpError(f"the weights are not in one {WEIGHTS_FILE}", where=new.path, hint="merge the shards")
    _check_comparable(old, new)
    own = {name: stored for name, stored in new.model_names.items() if _differs(old, new, name)}
    stored = [name for name in new.tensors if name in set(own.values())]
    weights = new.path / WEIGHTS_FILE
    with weights.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode("utf-8")
    head = Head(
        schema_version=SCHEMA_VERSION,
        family=new.family.name,
        base=Base(path=str(old.path), fingerprint=old.fingerprint()),
        fingerprint=new.fingerprint(),
        parameters=sum(new.tensors[name].elements for name in stored),
        total=sum(tensor.elements for tensor in new.tensors.values()),
        names=own,
        header=header,
        sha256=_sha256(weights),
        absent=sorted(_other_files(old) - _other_files(new)),
    )
    with _reported(target), atomic_folder(target, overwrite) as folder:
        with (folder / TENSORS_FILE).open("wb") as file:
            file.write(encode_header(((name, new.tensors[name]) for name in stored), {}))
            for name in stored:
                _copy(_bytes(new, new.tensors[name]), file)
        for name in sorted(_other_files(new)):
            if name not in _other_files(old) or (old.path / name).read_bytes() != (new.path / name).read_bytes():
                (folder / FILES_FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(new.path / name, folder / FILES_FOLDER / name)
        (folder / HEAD_FILE).write_text(json.dumps(head.model_dump(), indent=1) + "\n", encoding="utf-8")
    return head


def apply_head(base: str | Path, head: str | Path, output: str | Path, overwrite: bool = False) -> Head:
    """Makes the fine-tuned checkpoint again: its weights file is the same, byte for byte.

    Args:
        base: The checkpoint from which the fine-tuning started.
        head: The head.
        output: The checkpoint folder to write.
        overwrite: Whether a folder that is not empty is replaced.

    Returns:
        What ``head.json`` says.

    Raises:
        ClpError: The head is damaged or belongs to another base, or the output folder cannot be written.
    """
    checkpoint, source = Checkpoint.open(base), Path(head).absolute()
    found = read_head(source)
    check_base(found, checkpoint, source)
    target = Path(output).absolute()
    check_apart(target, [checkpoint.path, source])
    tensors = head_tensors(source, found)
    stored_in_base = checkpoint.model_names
    by_stored = {stored: name for name, stored in _all_names(found, checkpoint).items()}
    with _reported(target), atomic_folder(target, overwrite) as folder:
        copy_files(checkpoint, source, found, folder)
        digest = hashlib.sha256()
        with (folder / WEIGHTS_FILE).open("wb") as file:
            text = found.header.encode("utf-8")
            for part in (len(text).to_bytes(8, "little"), text):
                file.write(part)
                digest.update(part)
            for name in _stored_order(found.header):
                if name in tensors:
                    data = _map(source / TENSORS_FILE, tensors[name])
                else:
                    data = _bytes(checkpoint, checkpoint.tensors[stored_in_base[by_stored[name]]])
                digest.update(data)
                _copy(data, file)
        if digest.hexdigest() != found.sha256:
            raise ClpError(
                "base and head do not give the fine-tuned checkpoint: one of them has changed since",
                where=source,
                hint="give undamaged copies of both",
            )

        def change(documents: dict[str, dict[str, Any]]) -> None:
            checkpoint.family.rewrite_local_paths(documents, target.resolve(), folder)

        rewrite_json(folder, change)
    return found


def head_tensors(folder: Path, head: Head) -> dict[str, TensorInfo]:
    """Returns the tensors of a head by stored name.

    Raises:
        ClpError: The file is missing or damaged.
    """
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise ClpError(f"there is no {TENSORS_FILE}", where=folder, hint="give an undamaged copy of the head")
    tensors, _ = read_header(path)
    if set(tensors) != set(head.names.values()):
        raise ClpError(f"the tensors are not those of {HEAD_FILE}", where=path, hint="extract the head again")
    return tensors


def copy_files(base: Checkpoint, folder: Path, head: Head, target: Path, link: bool = False) -> None:
    """Fills a folder with the files of the fine-tuned checkpoint but for the weights.

    Args:
        base: The base.
        folder: The head's folder.
        head: The head.
        target: The folder to fill.
        link: Whether the base's files are linked instead of copied.
    """
    own = folder / FILES_FOLDER
    mine = {str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()} if own.is_dir() else set()
    for name in _other_files(base) | mine:
        if name in head.absent:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link and name not in mine:
            (target / name).symlink_to(base.path / name)
        else:
            shutil.copyfile((own if name in mine else base.path) / name, target / name)


def _other_files(checkpoint: Checkpoint) -> set[str]:
    return checkpoint.files.keys() - {WEIGHTS_FILE, INDEX_FILE, *checkpoint.weight_files}


def _check_comparable(old: Checkpoint, new: Checkpoint) -> None:
    where, hint = new.path, "give the checkpoint from which the fine-tuning started"
    if old.family.name != new.family.name:
        raise ClpError(f"the base is a {old.family.name}, this is a {new.family.name}", where=where, hint=hint)
    missing = sorted(new.model_names.keys() ^ old.model_names.keys())
    if missing:
        raise ClpError(f"only one of base and fine-tuned checkpoint has {missing[0]}", where=where, hint=hint)
    for name, stored in new.model_names.items():
        if new.tensors[stored].shape != old.tensors[old.model_names[name]].shape:
            raise ClpError(f"{stored} has another shape than in the base", where=where, hint=hint)


def _differs(old: Checkpoint, new: Checkpoint, name: str) -> bool:
    before, after = old.tensors[old.model_names[name]], new.tensors[new.model_names[name]]
    return before.dtype != after.dtype or not np.array_equal(_bytes(old, before), _bytes(new, after))


def _all_names(head: Head, base: Checkpoint) -> dict[str, str]:
    """Returns the stored name in the fine-tuned checkpoint of each tensor of the model."""
    stored = set(_stored_order(head.header))
    own = dict(head.names)
    for name, before in base.model_names.items():
        own.setdefault(name, name if name in stored else before)
    return own


def _stored_order(header: str) -> list[str]:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return sorted(entries, key=lambda name: tuple(entries[name]["data_offsets"]))


def _bytes(checkpoint: Checkpoint, tensor: TensorInfo) -> np.ndarray:
    return _map(checkpoint.path / tensor.file, tensor)


def _map(path: Path, tensor: TensorInfo) -> np.ndarray:
    """Returns the bytes of a tensor, as uint8, mapped into memory."""
    if not tensor.nbytes:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r", tensor.start, (tensor.nbytes,))


def _pieces(data: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]


def _copy(data: np.ndarray, file: BinaryIO) -> None:
    for piece in _pieces(data):
        file.write(piece.data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Converts an error of the file system into a ClpError."""
    try:
        yield
    except OSError as error:
        raise ClpError(
            f"the folder cannot be written ({error.strerror or error})",
            where=error.filename or target,
            hint="make room on the disk, or give another --output",
        ) from error
