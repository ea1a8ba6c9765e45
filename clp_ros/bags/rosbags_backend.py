# SPDX-License-Identifier: Apache-2.0
"""Reads storage files without ROS. PyPI's ``rosbags`` deserializes the messages with the definitions in the bag."""

import logging
import shutil
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcap.exceptions import McapError
from rosbags.interfaces import Nodetype
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, TypesysError, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from clp_ros.bags.mcap_file import McapFile
from clp_ros.bags.metadata import BagInfo, StorageFile, check_whole, collect_topics
from clp_ros.bags.names import absolute_topic, full_type
from clp_ros.bags.sqlite_file import SqliteFile
from clp_ros.bags.storage import CorruptMessageError
from clp_ros.bags.storage_file import Channel, DamagedFileError, OpenFile
from clp_ros.core.errors import ClpError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_logger = logging.getLogger(__name__)

# Exceptions that a damaged file can cause.
_DAMAGED = (
    DamagedFileError,
    McapError,
    sqlite3.Error,
    zstd.ZstdError,
    struct.error,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    MemoryError,
    OverflowError,
)


class RosbagsBackend:
    """Reads storage files. Message definitions come from the bag, otherwise from ROS 2 Jazzy."""

    name = "rosbags"

    def __init__(self) -> None:
        # One store for each type, because the definitions of two types may contain different versions of a third.
        self._recorded: dict[str, Typestore] = {}
        self._jazzy = get_typestore(Stores.ROS2_JAZZY)

    def inspect(self, path: Path, storage_id: str) -> BagInfo:
        """Describes a single storage file, from the file's index.

        Raises:
            ClpError: The file cannot be read.
        """
        with _open(path, storage_id) as file:
            counts, start_ns, end_ns = file.counts()
            topics = collect_topics(
                (channel.topic, channel.type, channel.serialization, counts.get(number, 0))
                for number, channel in file.channels.items()
            )
        return BagInfo(path, storage_id, "", topics, start_ns, end_ns, (StorageFile(path, start_ns),))

    def read(self, bag: BagInfo, file: StorageFile, topics: Collection[str]) -> Generator[tuple[str, int, bytes]]:
        """Yields (topic, receive time in ns, serialized message) of one file in receive order.

        Raises:
            ClpError: The file is damaged or otherwise unreadable.
        """
        with _decompressed(bag, file.path) as path, _open(path, bag.storage_id, shown=file.path) as opened:
            names = {
                number: absolute_topic(channel.topic)
                for number, channel in opened.channels.items()
                if absolute_topic(channel.topic) in topics
                and full_type(channel.type) == bag.topics[absolute_topic(channel.topic)].type
            }
            for number in names:
                self._learn(opened.channels[number], file.path)
            if names:
                for number, receive_ns, raw in opened.messages(names):
                    yield names[number], receive_ns, raw

    def decode(self, bag: BagInfo, message_type: str, raw: bytes) -> Any:
        """Deserializes one message.

        Raises:
            CorruptMessageError: ``raw`` is not a message of that type.
            ClpError: Neither the bag nor ROS 2 Jazzy defines the type.
        """
        store = self._store(message_type)
        try:
            if bag.compression == "message":
                raw = zstd.decompress(raw)
            return store.deserialize_cdr(raw, message_type)
        except (
            SerdeError,
            zstd.ZstdError,
            struct.error,
            ValueError,
            LookupError,
            AssertionError,
            MemoryError,
        ) as error:
            raise CorruptMessageError(str(error)) from error

    def _store(self, message_type: str) -> Typestore:
        store = self._recorded.get(message_type, self._jazzy)
        if message_type in store.fielddefs:
            return store
        raise ClpError(
            "neither the bag nor ROS 2 Jazzy defines this message type",
            where=message_type,
            hint="leave the topic out, or record as mcap, which includes the definitions",
        )

    def _learn(self, channel: Channel, path: Path) -> None:
        kind = full_type(channel.type)
        text = channel.definition.decode(errors="replace")
        # Some writers leave the definition out, or write "unknown".
        if kind in self._recorded or not text.strip() or channel.definition_format not in _DEFINITIONS:
            return
        store = get_typestore(Stores.EMPTY)
        try:
            for types in _DEFINITIONS[channel.definition_format](text, kind):
                store.register(types)
            self._recorded[kind] = _complete(store, self._jazzy, kind)
        except TypesysError as error:
            if kind in self._jazzy.fielddefs:
                _logger.debug("%s: ROS 2's own definition of %s is used (%s)", path, kind, error)
                return
            raise ClpError(
                f"the bag's definition of {kind} cannot be used ({error})",
                where=path,
                hint="leave the topic out, or record again",
            ) from error


def _complete(store: Typestore, standard: Typestore, kind: str) -> Typestore:
    """Returns the store with the types that a definition uses but does not include, as far as ROS 2 Jazzy has them."""
    missing = [kind]
    while missing:
        name = missing.pop()
        if name not in store.fielddefs:
            if name not in standard.fielddefs:
                raise TypesysError(f"it uses {name}, which nothing defines")
            store.register({name: standard.fielddefs[name]})
        missing += [used for used in _used_types(store, name) if used not in store.fielddefs]
    return store


def _used_types(store: Typestore, name: str) -> Iterator[str]:
    for _, field in store.fielddefs[name][1]:
        node: Any
        value: Any
        node, value = field
        while node in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            node, value = value[0]
        if node == Nodetype.NAME:
            yield value


def _from_idl(text: str, _kind: str) -> Iterator[Any]:
    # rosbag2 writes IDL definitions as sections, each under a ruler and a line "IDL: <type>".
    for section in text.split("=" * 80 + "\n"):
        definition = section.partition("\n")[2] if section.startswith("IDL: ") else section
        if definition.strip():
            yield get_types_from_idl(definition)


def _from_msg(text: str, kind: str) -> Iterator[Any]:
    yield get_types_from_msg(text, kind)


_DEFINITIONS = {"ros2msg": _from_msg, "ros2idl": _from_idl, "omgidl": _from_idl}


@contextmanager
def _decompressed(bag: BagInfo, path: Path) -> Iterator[Path]:
    """Yields the file, or a temporary decompressed copy. There is one copy at a time, to bound the disk use."""
    if bag.compression != "file":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="clp_bag_") as folder:
        plain = Path(folder) / path.stem
        try:
            with zstd.open(path, "rb") as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            raise ClpError(
                f"truncated bag: the compressed file has no proper end ({error})",
                where=path,
                hint="copy the file again",
            ) from error
        except OSError as error:
            raise ClpError(
                f"the file cannot be decompressed ({error.strerror})",
                where=path,
                hint=f"make room in {tempfile.gettempdir()}, or point TMPDIR elsewhere",
            ) from error
        with _as(path, plain):
            check_whole(plain, bag.storage_id)
        yield plain


@contextmanager
def _as(shown: Path, path: Path) -> Iterator[None]:
    """Replaces the path of a temporary decompressed copy in errors by that of the bag's file."""
    try:
        yield
    except ClpError as error:
        if error.where != str(path) or shown == path:
            raise
        raise error.at(shown) from error


@contextmanager
def _open(path: Path, storage_id: str, shown: Path | None = None) -> Iterator[OpenFile]:
    try:
        with _as(shown or path, path), McapFile(path) if storage_id == "mcap" else SqliteFile(path) as file:
            yield file
    except ClpError:
        raise
    except OSError as error:
        raise ClpError(
            f"the file cannot be read ({error.strerror})", where=shown or path, hint="check the disk"
        ) from error
    except _DAMAGED as error:
        raise ClpError(
            f"the file is damaged ({str(error) or type(error).__name__})",
            where=shown or path,
            hint="copy the file again, or repair it (mcap recover; sqlite3's .recover, then ros2 bag reindex)",
        ) from error
