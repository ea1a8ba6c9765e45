# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder read and checked without loading it: config.json, the weights' headers, the list of files.

Nothing here imports torch, maps weights into memory or unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from clp_ros.checkpoints.hub import local_folder
from clp_ros.checkpoints.layer_keys import LayerKeys, check_layers
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.not_a_checkpoint import (
    is_pickle,
    refuse_missing_state,
    refuse_missing_weights,
    refuse_old_statistics,
    refuse_training_folder,
)
from clp_ros.checkpoints.safetensors_header import TensorInfo, read_header
from clp_ros.core.errors import ClpError
from clp_ros.core.files import is_temporary
from clp_ros.core.json_object import parse_json, read_json_object
from clp_ros.policies.family import Config, Family
from clp_ros.policies.registry import family_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"  # the one file stock lerobot loads
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "clp.json"
PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")

_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# Version control and download records: not part of the checkpoint, and wrong for a copy of it.
_IGNORED_FOLDERS = {".git", ".cache"}
_SAMPLES = 4  # blocks of a tensor that the fingerprint reads, evenly spaced, first and last among them
_SAMPLE_BYTES = 4096

# Device, inode, size, and time of the last change in nanoseconds: equal only for one file with one content.
type FileStamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder. Make one with :meth:`open`.

    Attributes:
        path: The folder, absolute.
        config: The parsed config.json.
        family: The VLA family.
        modules: Its prunable modules.
        tensors: Every stored tensor by name, in the order of files and bytes.
        metadata: The ``__metadata__`` strings of all weight files. safetensors stores shared tensors once and writes
            ``{other name: stored name}`` here: see :attr:`shared`.
        weight_files: Names of the files that hold the weights.
        files: Size in bytes of every file, by its path relative to the folder (with ``/``); links are followed. Pickle
            files, such as a trainer leaves beside the weights, are no part of the checkpoint.
        stamps: Which files the weights' headers were read from, by name: see :meth:`check_unchanged`.
        manifest: The parsed clp.json (:class:`clp_ros.checkpoints.manifest.Manifest`); None if it was never pruned.
    """

    path: Path
    config: Config
    family: Family
    modules: tuple[LayerStack, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    weight_files: tuple[str, ...]
    files: Mapping[str, int]
    stamps: Mapping[str, FileStamp]
    manifest: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Reads and checks a checkpoint folder: no more than headers and JSON are read.

        The weights are ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names. Links to files
        (a hub snapshot consists of them) and folders are followed.

        Args:
            folder: The folder, or a repository id: see :func:`clp_ros.checkpoints.hub.local_folder`.

        Raises:
            ClpError: Something in it is missing, damaged, contradictory or unsafe. The message says what and where.
        """
        folder = local_folder(folder).resolve()
        try:
            return cls._open(folder)
        except OSError as error:
            raise ClpError(
                f"cannot be read ({error.strerror or error})",
                where=error.filename or folder,
                fix="check the path and its permissions",
            ) from error

    @classmethod
    def _open(cls, folder: Path) -> Checkpoint:
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise ClpError(f"the checkpoint folder {fault}", where=folder, fix="give a folder with config.json in it")
        if is_temporary(folder):
            raise ClpError(
                "the folder is what a command left that was killed while it wrote",
                where=folder,
                fix="run that command again, which clears it away",
            )
        refuse_training_folder(folder)
        found = dict(sorted(_walk(folder)))
        files = {name: size for name, size in found.items() if not is_pickle(name)}
        if CONFIG_FILE not in files:
            raise ClpError(
                f"there is no {CONFIG_FILE}", where=folder, fix="give a folder that save_pretrained of lerobot wrote"
            )
        config = read_json_object(folder / CONFIG_FILE)
        try:
            family = family_of(config, folder / CONFIG_FILE)
            modules = family.modules(config)
        except ClpError as error:  # a family does not know where the config lies
            raise ClpError(error.what, where=folder / CONFIG_FILE, fix=error.fix) from error
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ClpError(  # a family reads its fields plainly; whatever type it meets there, the file is at fault
                f"a field has the wrong type ({error})", where=folder / CONFIG_FILE, fix="give an undamaged copy of it"
            ) from error
        if WEIGHTS_FILE not in files and INDEX_FILE not in files:
            refuse_missing_weights(folder, files, found.keys() - files.keys())
        tensors, metadata, stamps = _read_weights(folder, files)
        try:
            if family.refuse_names is not None:
                family.refuse_names(tensors)
        except ClpError as error:
            raise ClpError(error.what, where=folder, fix=error.fix) from error
        refuse_old_statistics(folder, tensors)
        for name in files.keys() - {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *stamps}:
            if name.endswith(".safetensors"):  # the processors' statistics
                read_header(folder / name)
            elif name.endswith(".json") and "/" not in name:  # their settings, which surgery rewrites
                document = parse_json((folder / name).read_bytes(), folder / name)
                if name in PROCESSORS:
                    refuse_missing_state(folder / name, document, files)
        if _is_unwrapped(family, tensors):
            modules = tuple(replace(m, layer_prefix=m.layer_prefix.removeprefix(family.wrapper)) for m in modules)
        checkpoint = cls(folder, config, family, modules, tensors, metadata, tuple(stamps), files, stamps)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes |= {name: tensors[stored].shape for name, stored in checkpoint.shared.items()}
        check_layers(modules, shapes, folder)
        if MANIFEST_FILE not in files:
            return checkpoint
        from clp_ros.checkpoints.manifest import (
            read_manifest,  # pydantic takes longer to import than all of this to run
        )

        manifest = read_manifest(folder / MANIFEST_FILE, family.name, checkpoint.layers)
        return replace(checkpoint, manifest=manifest)

    @property
    def layers(self) -> dict[str, int]:
        """Number of layers, by module."""
        return {module.name: module.layers for module in self.modules}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    @cached_property
    def shared(self) -> dict[str, str]:
        """Names under which a shared (tied) tensor is not stored, with the name it is stored under."""
        return {
            name: stored
            for name, stored in self.metadata.items()
            if stored in self.tensors and name not in self.tensors
        }

    @cached_property
    def model_names(self) -> dict[str, str]:
        """See :func:`model_names`."""
        return model_names(self.family, self.tensors)

    def parameters(self) -> int:
        """Number of parameters (elements of all stored tensors: a shared tensor counts once)."""
        return sum(tensor.elements for tensor in self.tensors.values())

    def module_parameters(self) -> dict[str, int]:
        """Number of parameters in the layers of each module."""
        keys, counts = LayerKeys(self.modules), dict.fromkeys(self.layers, 0)
        for name, tensor in self.tensors.items():
            if key := keys.split(name):
                counts[key.module] += tensor.elements
        return counts

    def check_unchanged(self, name: str, descriptor: int | None = None) -> None:
        """Refuses a weight file that is not, or no longer, the one whose header was read. For after it was read.

        Args:
            name: One of :attr:`weight_files`.
            descriptor: What it was read through; by default, the file of that name is looked at.

        Raises:
            ClpError: It was replaced, written to, or taken away.
        """
        path = self.path / name
        try:
            unchanged = _stamp(path if descriptor is None else descriptor) == self.stamps[name]
        except OSError:
            unchanged = False
        if not unchanged:  # a training run that saves over its last checkpoint, say
            raise ClpError("the file changed while it was read", where=path, fix="try again when it is whole")

    def fingerprint(self) -> str:
        """SHA-256 that tells checkpoints apart without reading them whole.

        It covers config.json, the shared-tensor names, and every tensor's name, dtype, shape and four evenly spaced
        blocks of 4 KiB (all bytes of a small tensor): cheap on 8 GB, and any training shows. It is the same when the
        folder moves or its weights are split into other files. For that, absolute paths in config.json count as
        absolute paths, whatever they point to.

        Raises:
            ClpError: A weight file cannot be read any more, or is another one now.
        """
        digest = hashlib.sha256()
        described = [[name, tensor.dtype, tensor.shape] for name, tensor in sorted(self.tensors.items())]
        digest.update(_canonical([_without_paths(self.config), self.shared, described]))
        try:
            with ExitStack() as stack:
                opened = {name: stack.enter_context((self.path / name).open("rb")) for name in self.weight_files}
                for _, tensor in sorted(self.tensors.items()):
                    for block in _blocks(tensor):
                        digest.update(os.pread(opened[tensor.file].fileno(), block.stop - block.start, block.start))
                for name, file in opened.items():
                    self.check_unchanged(name, file.fileno())
        except OSError as error:
            raise ClpError(
                f"cannot be read any more ({error.strerror})", where=error.filename or self.path, fix="check the folder"
            ) from error
        return digest.hexdigest()


def _stamp(file: Path | int) -> FileStamp:
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def model_names(family: Family, stored: Collection[str]) -> dict[str, str]:
    """The tensors that lerobot's model takes from a checkpoint.

    Args:
        family: The family.
        stored: Names of the stored tensors.

    Returns:
        The stored name, by the name in the model. A tensor that is stored for two is there under both names; one that
        lerobot's loading leaves out is not there.
    """
    unwrapped = _is_unwrapped(family, stored)
    names = {}
    for name in stored:
        own: str | None = name
        if unwrapped:
            own = family.unwrapped_name(name) if family.unwrapped_name else name
            own = None if own is None else family.wrapper + own
        if own is not None:
            names[own] = name
    for one, other in family.tied.items():
        if other not in names and one in names:
            names[other] = names[one]
        if unwrapped and one not in names and other in names:
            names[one] = names[other]
    return names


def _is_unwrapped(family: Family, names: Collection[str]) -> bool:
    """Whether the tensors are named as in the published model, not as in the one lerobot wraps around it."""
    return bool(family.wrapper) and not any(name.startswith(family.wrapper) for name in names)


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Yields every file's path relative to the folder, with ``/``, and its size."""
    for current, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS)
        real = Path(current).resolve()
        for name in folders:
            if real.is_relative_to(Path(current, name).resolve()):
                raise ClpError("the link leads back to a folder around it", where=Path(current, name), fix="remove it")
        for name in names:
            path = Path(current, name)
            if path.is_symlink() and not path.exists():
                raise ClpError("the link leads nowhere", where=path, fix="download the checkpoint again")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
                raise ClpError("neither a file nor a folder", where=path, fix="remove it")
            yield path.relative_to(folder).as_posix(), status.st_size


def _raise(error: OSError) -> None:
    raise error


def _read_weights(
    folder: Path, files: Mapping[str, int]
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, FileStamp]]:
    """Reads the headers of all weight files and holds them against the index, if there is one.

    Returns:
        The tensors, the metadata, and the stamps by name of the weight file.
    """
    index = _read_index(folder / INDEX_FILE) if INDEX_FILE in files else None
    if index is None and WEIGHTS_FILE not in files:
        raise ClpError(f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}", where=folder, fix="give a whole checkpoint")
    names = tuple(sorted(set(index.values()))) if index is not None else (WEIGHTS_FILE,)
    for name in names:
        if name not in files:
            raise ClpError(f"the shard {name} is missing", where=folder, fix="give a whole checkpoint")
    for name in files:
        if (name == WEIGHTS_FILE or _SHARD_NAME.fullmatch(name)) and name not in names:
            raise ClpError(
                "more weights than the index names: which ones count is unclear" if index is not None
                else "a shard without an index",
                where=folder / name,
                fix="keep either the single file, or the index and its shards",
            )  # fmt: skip
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    stamps = {}
    for name in names:
        stamps[name] = _stamp(folder / name)
        found, notes = read_header(folder / name)
        for tensor in found:
            if tensor in tensors:
                raise ClpError(f"tensor {tensor} is in {tensors[tensor].file} too", where=folder / name)
            if index is not None and index.get(tensor) != name:
                raise ClpError(
                    f"tensor {tensor} is not where the index says ({index.get(tensor, 'nowhere')})",
                    where=folder / name,
                    fix="give the index that was saved with these shards",
                )
        for key, value in notes.items():
            if metadata.setdefault(key, value) != value:
                raise ClpError(f"__metadata__ {key!r} differs from another shard's", where=folder / name)
        tensors |= found
    if index is not None and (absent := sorted(index.keys() - tensors.keys())):
        raise ClpError(
            f"the index names {absent[0]} in {index[absent[0]]}, which lacks it",
            where=folder / INDEX_FILE,
            fix="give the index that was saved with these shards",
        )
    return tensors, metadata, stamps


def _read_index(path: Path) -> dict[str, str]:
    fix = "give an undamaged copy of the index"
    weight_map = read_json_object(path, fix).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ClpError("weight_map is not an object of tensor and file names", where=path, fix=fix)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise ClpError(f"weight_map puts {tensor} into {name!r}, no plain file name", where=path, fix=fix)
        if not name.endswith(".safetensors"):
            raise ClpError(f"weight_map puts {tensor} into {name!r}, no safetensors file", where=path, fix=fix)
    return weight_map


def _is_plain_name(name: str) -> bool:
    # Also under Windows' rules: "C:model.safetensors" and "a\b" are paths there.
    return name.isprintable() and name not in {"", ".", ".."} and PureWindowsPath(name).name == name == Path(name).name


def _blocks(tensor: TensorInfo) -> Iterator[range]:
    """The byte ranges of a tensor that the fingerprint covers."""
    if tensor.bytes <= _SAMPLES * _SAMPLE_BYTES:
        yield range(tensor.start, tensor.end)
        return
    for sample in range(_SAMPLES):
        start = tensor.start + (tensor.bytes - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
        yield range(start, start + _SAMPLE_BYTES)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return "<absolute path>" if isinstance(value, str) and PurePath(value).is_absolute() else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
