# SPDX-License-Identifier: Apache-2.0
"""Reads and checks a checkpoint folder without loading the weights: config.json, headers, list of files.

This module does not import torch, map weights into memory or unpickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from clp_ros.checkpoints.folder import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    PROCESSORS,
    WEIGHTS_FILE,
    FileStamp,
    file_stamp,
    list_files,
    read_weights,
)
from clp_ros.checkpoints.hub import local_folder
from clp_ros.checkpoints.layer_keys import LayerKeys, check_layers
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.not_a_checkpoint import (
    is_pickle,
    refuse_adapter,
    refuse_missing_state,
    refuse_old_statistics,
    refuse_pickled_weights,
    refuse_training_folder,
)
from clp_ros.checkpoints.safetensors_header import TensorInfo, read_header
from clp_ros.core.errors import ClpError
from clp_ros.core.files import is_temporary, refuse_lfs_pointer
from clp_ros.core.json_object import parse_json, read_json_object
from clp_ros.policies.family import Config, Family
from clp_ros.policies.registry import family_of

_SAMPLES = 4  # number of evenly spaced blocks of a tensor that the fingerprint reads, including the first and the last
_SAMPLE_BYTES = 4096
# A tokenizer's or a VLM's files in a sub-folder. A clone without Git LFS has pointers in their place.
_MODEL_FILES = (".json", ".model", ".txt")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder. Create it with :meth:`open`.

    Attributes:
        path: The folder, absolute.
        config: The parsed config.json.
        family: The VLA family.
        layer_stacks: Its prunable layer stacks.
        tensors: Every stored tensor by name, in the order of files and bytes.
        metadata: The ``__metadata__`` strings of all weight files. safetensors stores shared tensors once and writes
            ``{other name: stored name}`` here: see :attr:`shared`.
        weight_files: Names of the files that hold the weights.
        files: Size in bytes of every file, by its path relative to the folder (with ``/``); links are followed. Pickle
            files, which trainers leave beside the weights, are not part of the checkpoint.
        stamps: Identity of the files from which the weights' headers were read, by name: see :meth:`check_unchanged`.
        manifest: The parsed clp.json (:class:`clp_ros.checkpoints.manifest.Manifest`); None if it was never pruned.
    """

    path: Path
    config: Config
    family: Family
    layer_stacks: tuple[LayerStack, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    weight_files: tuple[str, ...]
    files: Mapping[str, int]
    stamps: Mapping[str, FileStamp]
    manifest: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Reads and checks a checkpoint folder. Only headers and JSON files are read.

        The weights are ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names. Links to files
        (as in a Hub snapshot) and folders are followed.

        Args:
            folder: The folder, or a repository id: see :func:`clp_ros.checkpoints.hub.local_folder`.

        Raises:
            ClpError: A file is missing, damaged, contradictory or unsafe.
        """
        folder = local_folder(folder).resolve()
        try:
            return cls._open(folder)
        except OSError as error:
            raise ClpError(
                f"the file cannot be read ({error.strerror or error})",
                where=error.filename or folder,
                hint="check the path and its permissions",
            ) from error

    @classmethod
    def _open(cls, folder: Path) -> Checkpoint:
        if not folder.is_dir():
            fault = "is not a folder" if folder.exists() else "does not exist"
            raise ClpError(
                f"the checkpoint folder {fault}",
                where=folder,
                hint="give a folder with config.json in it, or a repository on the Hub as owner/name",
            )
        if is_temporary(folder):
            raise ClpError(
                "a killed command left this incomplete folder",
                where=folder,
                hint="run the command again, which deletes the folder",
            )
        refuse_training_folder(folder)
        if not (folder / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_symlink():
            refuse_adapter(folder)
            raise ClpError(
                f"there is no {CONFIG_FILE}", where=folder, hint="give a folder that save_pretrained of lerobot wrote"
            )
        found = dict(sorted(list_files(folder)))
        files = {name: size for name, size in found.items() if not is_pickle(name)}
        config = read_json_object(folder / CONFIG_FILE)
        try:
            family = family_of(config, folder / CONFIG_FILE)
            stacks = family.layer_stacks(config)
        except ClpError as error:  # a family does not know the path of the config
            raise ClpError(error.what, where=folder / CONFIG_FILE, hint=error.hint) from error
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ClpError(  # a family does not check the types of fields, so these errors mean a wrong file
                f"a field has the wrong type ({error})", where=folder / CONFIG_FILE, hint="give an undamaged copy of it"
            ) from error
        if WEIGHTS_FILE not in files and INDEX_FILE not in files:
            refuse_adapter(folder)
            refuse_pickled_weights(folder, found.keys() - files.keys())
        tensors, metadata, stamps = read_weights(folder, files)
        try:
            if family.refuse_names is not None:
                family.refuse_names(tensors)
        except ClpError as error:
            raise ClpError(error.what, where=folder, hint=error.hint) from error
        refuse_old_statistics(folder, tensors)
        for name in files.keys() - {CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *stamps}:
            if name.endswith(".safetensors"):  # statistics of the processors
                read_header(folder / name)
            elif name.endswith(".json") and "/" not in name:  # settings of the processors, which surgery rewrites
                document = parse_json((folder / name).read_bytes(), folder / name)
                if name in PROCESSORS:
                    refuse_missing_state(folder / name, document, files)
            elif name.endswith(_MODEL_FILES):
                with (folder / name).open("rb") as file:
                    refuse_lfs_pointer(file.read(64), folder / name)
        if _is_unwrapped(family, tensors):
            stacks = tuple(replace(s, layer_prefix=s.layer_prefix.removeprefix(family.wrapper)) for s in stacks)
        checkpoint = cls(folder, config, family, stacks, tensors, metadata, tuple(stamps), files, stamps)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        shapes |= {name: tensors[stored].shape for name, stored in checkpoint.shared.items()}
        check_layers(stacks, shapes, folder)
        if MANIFEST_FILE not in files:
            return checkpoint
        from clp_ros.checkpoints.manifest import (
            read_manifest,  # importing pydantic takes longer than the rest of this function
        )

        manifest = read_manifest(folder / MANIFEST_FILE, family.name, stacks)
        return replace(checkpoint, manifest=manifest)

    @property
    def layers(self) -> dict[str, int]:
        """Number of layers, by layer stack."""
        return {stack.name: stack.layers for stack in self.layer_stacks}

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    @cached_property
    def shared(self) -> dict[str, str]:
        """Other names of shared (tied) tensors: name -> name under which the tensor is stored."""
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
        """Number of parameters in the layers of each stack."""
        keys, counts = LayerKeys(self.layer_stacks), dict.fromkeys(self.layers, 0)
        for name, tensor in self.tensors.items():
            if key := keys.split(name):
                counts[key.module] += tensor.elements
        return counts

    def check_unchanged(self, name: str, descriptor: int | None = None) -> None:
        """Refuses a weight file that has changed since its header was read. Call it after reading the file.

        Args:
            name: One of :attr:`weight_files`.
            descriptor: Descriptor through which it was read; by default, the file of that name is checked.

        Raises:
            ClpError: The file was replaced, written or removed.
        """
        path = self.path / name
        try:
            unchanged = file_stamp(path if descriptor is None else descriptor) == self.stamps[name]
        except OSError:
            unchanged = False
        if not unchanged:  # for example by a training that overwrites its last checkpoint
            raise ClpError("the file changed while it was read", where=path, hint="try again when it is complete")

    def fingerprint(self) -> str:
        """Returns a SHA-256 that distinguishes checkpoints without reading all bytes.

        It covers config.json, the names of shared tensors, and every tensor's name, dtype, shape and four evenly spaced
        blocks of 4 KiB (all bytes of a small tensor). This is cheap for 8 GB, and changes with any training. It does
        not change if the folder moves or its weights are split into other files. Therefore, all absolute paths in
        config.json are treated as equal.

        Raises:
            ClpError: A weight file cannot be read any more, or has changed.
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
                f"the file cannot be read any more ({error.strerror})",
                where=error.filename or self.path,
                hint="check the folder",
            ) from error
        return digest.hexdigest()


def model_names(family: Family, stored: Collection[str]) -> dict[str, str]:
    """Returns the tensors that lerobot's model loads from a checkpoint.

    Args:
        family: The family.
        stored: Names of the stored tensors.

    Returns:
        The stored name, by the name in the model. A shared tensor is listed under both names; a tensor that lerobot
        does not load is not listed.
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
    """Whether the tensors have the names of the published model, without lerobot's prefix."""
    return bool(family.wrapper) and not any(name.startswith(family.wrapper) for name in names)


def _blocks(tensor: TensorInfo) -> Iterator[range]:
    """Yields the byte ranges of a tensor that the fingerprint covers."""
    if tensor.nbytes <= _SAMPLES * _SAMPLE_BYTES:
        yield range(tensor.start, tensor.end)
        return
    for sample in range(_SAMPLES):
        start = tensor.start + (tensor.nbytes - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
        yield range(start, start + _SAMPLE_BYTES)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return "<absolute path>" if isinstance(value, str) and PurePath(value).is_absolute() else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
