# SPDX-License-Identifier: Apache-2.0
"""Storage files through PyPI's ``rosbags``: wherever there is no ROS. It reads the definitions a bag carries."""

import shutil
import struct
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
from rosbags.interfaces import Connection, MessageDefinitionFormat
from rosbags.rosbag2 import Reader, ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, TypesysError, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from clp_ros.bags.metadata import BagInfo, StorageFile, check_serialization, check_whole, collect_topics
from clp_ros.bags.storage import CorruptMessage
from clp_ros.errors import ClpError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# rosbags checks much of a file, but a damaged one still meets bare struct, ord() and dict look-ups in it.
_UNREADABLE = (
    ReaderError,
    apsw.Error,
    zstd.ZstdError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


class RosbagsBackend:
    """Reads storage files with ``rosbags``; definitions come from the bag, else from ROS 2 Jazzy's own messages."""

    name = "rosbags"

    def __init__(self) -> None:
        self._recorded = get_typestore(Stores.EMPTY)
        self._jazzy = get_typestore(Stores.ROS2_JAZZY)

    def inspect(self, path: Path, storage_id: str) -> BagInfo:
        """Describes a single storage file, from its own index.

        Raises:
            ClpError: The file cannot be read.
        """
        with _open(path) as reader:
            for connection in reader.connections:
                check_serialization(connection.ext.serialization_format, connection.topic, path)
            topics = collect_topics(((c.topic, c.msgtype, c.msgcount) for c in reader.connections), path)
            start_ns, end_ns = reader.start_time, reader.end_time - 1  # rosbags' end is exclusive
        return BagInfo(path, storage_id, "", topics, start_ns, end_ns, (StorageFile(path, start_ns),))

    def read(self, bag: BagInfo, file: StorageFile, topics: Collection[str]) -> Iterator[tuple[str, int, bytes]]:
        """Yields (topic, receive time in ns, serialized message) of one file in receive order.

        Raises:
            ClpError: The file is truncated or otherwise unreadable.
        """
        with _decompressed(bag, file.path) as path, _open(path, shown=file.path) as reader:
            connections = [c for c in reader.connections if c.topic in topics]
            for connection in connections:
                self._learn(connection, file.path)
            if connections:  # to rosbags, no connections means all of them
                for connection, receive_ns, raw in reader.messages(connections):
                    yield connection.topic, receive_ns, raw

    def decode(self, bag: BagInfo, message_type: str, raw: bytes) -> Any:
        """Deserializes one message.

        Raises:
            CorruptMessage: ``raw`` is not a message of that type.
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
            raise CorruptMessage(str(error)) from error

    def _store(self, message_type: str) -> Typestore:
        for store in (self._recorded, self._jazzy):
            if message_type in store.fielddefs:
                return store
        raise ClpError(
            f"no definition of the message type {message_type} is known",
            where="the bag carries none, and ROS 2 Jazzy has none",
            fix="leave its topic out, or record as mcap, which carries the definitions",
        )

    def _learn(self, connection: Connection, path: Path) -> None:
        if connection.msgtype in self._recorded.fielddefs or connection.msgdef.format == MessageDefinitionFormat.NONE:
            return
        try:
            if connection.msgdef.format == MessageDefinitionFormat.MSG:
                self._recorded.register(get_types_from_msg(connection.msgdef.data, connection.msgtype))
                return
            # rosbag2 writes IDL definitions as sections, each under a ruler and a line "IDL: <type>".
            ruler = "=" * 80 + "\n"
            for section in connection.msgdef.data.split(ruler):
                text = section.partition("\n")[2] if section.startswith("IDL: ") else section
                if text.strip():
                    self._recorded.register(get_types_from_idl(text))
        except TypesysError as error:
            raise ClpError(
                f"the bag's definition of {connection.msgtype} cannot be used ({error})",
                where=path,
                fix="leave its topic out, or record again",
            ) from error


@contextmanager
def _decompressed(bag: BagInfo, path: Path) -> Iterator[Path]:
    """The file itself, or a temporary decompressed copy: one file at a time, so disk use does not grow with the bag."""
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
                f"truncated bag: the compressed file has no proper end ({error})", where=path, fix="copy it again"
            ) from error
        except OSError as error:
            raise ClpError(
                f"cannot decompress the bag's file ({error.strerror})",
                where=path,
                fix=f"make room in {tempfile.gettempdir()}, or point TMPDIR elsewhere",
            ) from error
        check_whole(plain, bag.storage_id)
        yield plain


@contextmanager
def _open(path: Path, shown: Path | None = None) -> Iterator[Reader]:
    try:
        with _nameable(path) as named, Reader(named) as reader:
            yield reader
    except ClpError:
        raise
    except _UNREADABLE as error:
        raise ClpError(
            f"the bag's file is truncated or damaged ({type(error).__name__}: {error})",
            where=shown or path,
            fix="copy it again, or repair it (ros2 bag reindex, ros2 bag convert, mcap recover)",
        ) from error


@contextmanager
def _nameable(path: Path) -> Iterator[Path]:
    """The file under a name that rosbags can open: it makes a URI of a database's without escaping it."""
    if path.suffix != ".db3" or not set("%#?").intersection(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="clp_bag_") as folder:
        link = Path(folder) / "bag.db3"
        link.symlink_to(path.absolute())
        yield link
