# SPDX-License-Identifier: Apache-2.0
"""Reads a rosbag2 recording message by message, with rosbag2_py or rosbags."""

import hashlib
import heapq
import importlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from clp_ros.bags.metadata import (
    CONVERT_ROS_1,
    SUFFIXES,
    ZSTD_MAGIC,
    BagInfo,
    StorageFile,
    Topic,
    check_whole,
    part_of_compressed,
    read_metadata,
)
from clp_ros.bags.names import absolute_topic
from clp_ros.bags.storage import Backend, CorruptMessageError
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean

__all__ = ["BagReader", "Message", "Topic", "open_bag"]

BackendName = Literal["rosbag2_py", "rosbags"]

_BACKENDS: dict[BackendName, tuple[str, str]] = {
    "rosbag2_py": ("clp_ros.bags.rosbag2_backend", "Rosbag2Backend"),
    "rosbags": ("clp_ros.bags.rosbags_backend", "RosbagsBackend"),
}
_HASH_WHOLE = 64 << 20
_HASH_BLOCK = 64 << 10
_HASH_BLOCKS = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """A recorded message.

    Attributes:
        topic: Its topic.
        type: Its ROS type, "sensor_msgs/msg/Image".
        receive_ns: When the recorder received it, nanoseconds.
        data: The message with ROS's field names (``data.header.stamp.sec``); arrays are array.array or numpy arrays.
    """

    topic: str
    type: str
    receive_ns: int
    data: Any


class BagReader:
    """A recording, open for reading. Storage files are open only while :meth:`messages` is being iterated.

    Attributes:
        path: The folder, or the single storage file.
        backend: The library that reads it, "rosbag2_py" or "rosbags".
        topics: The topics by name, with type, message count and, if a topic cannot be read, the reason.
        start_ns: Receive time of the first message, nanoseconds.
        end_ns: Receive time of the last message, nanoseconds.
        message_count: Of all topics together.
        dropped: Messages whose bytes could not be deserialized, by topic, in the latest run of :meth:`messages`.
    """

    def __init__(self, info: BagInfo, backend: Backend) -> None:
        self._info = info
        self._backend = backend
        self.path = info.path
        self.backend = backend.name
        self.topics: dict[str, Topic] = dict(info.topics)
        self.start_ns = info.start_ns
        self.end_ns = info.end_ns
        self.message_count = sum(topic.count for topic in self.topics.values())
        self.dropped: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing: :meth:`messages` closes the files that it opens."""

    def messages(self, topics: Collection[str] | None = None) -> Iterator[Message]:
        """Yields the messages of ``topics`` (None: all) in receive order; equal times keep the recorded order.

        Messages are read on demand: memory does not grow with the bag. A message whose bytes are damaged is left out
        and counted in ``dropped``; the caller decides how many are too many.

        Raises:
            ClpError: At the call, a topic is not in the bag or cannot be read. While iterating, a file is damaged, a
                message type has no known definition, or the bag has fewer messages than its metadata says.
        """
        wanted = frozenset(self.topics if topics is None else map(absolute_topic, topics))
        if unknown := sorted(wanted - self.topics.keys()):
            raise ClpError(
                f"topic {unknown[0]} is not in the bag",
                where=self.path,
                hint=did_you_mean(unknown[0], list(self.topics)),
            )
        for name in sorted(wanted):
            self.check_readable(name)
        return self._read(wanted)

    def check_readable(self, topic: str) -> None:
        """Raises ClpError unless a topic's messages are ROS 2 messages of one type."""
        found = self.topics[topic]
        if found.fault:
            raise ClpError(f"topic {topic} {found.fault}", where=self.path, hint=found.hint)

    def _read(self, wanted: frozenset[str]) -> Iterator[Message]:
        self.dropped = {}
        dropped = self.dropped
        counts: Counter[str] = Counter()
        with closing(self._serialized(wanted)) as serialized:
            for topic, receive_ns, raw in serialized:
                counts[topic] += 1
                if not self._info.compression and bytes(raw[: len(ZSTD_MAGIC)]) == ZSTD_MAGIC:
                    raise self._compressed()
                message_type = self.topics[topic].type
                try:
                    data = self._backend.decode(self._info, message_type, raw)
                except CorruptMessageError as error:
                    if topic not in dropped:
                        _logger.warning("%s: a message of %s is damaged and left out (%s)", self.path, topic, error)
                    dropped[topic] = dropped.get(topic, 0) + 1
                    continue
                yield Message(topic, message_type, receive_ns, data)
        for name in sorted(wanted):
            if counts[name] < self.topics[name].count:
                raise ClpError(
                    f"truncated bag: only {counts[name]} of {self.topics[name].count} messages of {name} are in it",
                    where=self.path,
                    hint="copy the bag again, or run `ros2 bag reindex` to use the messages that it has",
                )

    def _compressed(self) -> ClpError:
        if self.path.is_file():
            return part_of_compressed(self.path)
        return ClpError(
            "the messages are compressed one by one, but metadata.yaml does not say so",
            where=self.path,
            hint="copy metadata.yaml again, or write compression_mode: MESSAGE and compression_format: zstd into it",
        )

    def _serialized(self, wanted: frozenset[str]) -> Generator[tuple[str, int, bytes]]:
        """The files' messages merged by receive time."""
        files = self._info.files
        with ExitStack() as stack:
            streams = [stack.enter_context(closing(self._from_file(file, wanted))) for file in files]
            if any(file.start_ns is None for file in files):
                merged: Iterable[tuple[int, tuple[str, int, bytes] | None]] = chain.from_iterable(
                    streams
                )  # before version 5 only the order of the files is known
            else:
                merged = heapq.merge(*streams, key=itemgetter(0))
            for _, message in merged:
                if message is not None:
                    yield message

    def _from_file(
        self, file: StorageFile, wanted: frozenset[str]
    ) -> Generator[tuple[int, tuple[str, int, bytes] | None]]:
        # The first item carries the start time only: the merge then opens a file no earlier than it needs to.
        yield file.start_ns or 0, None
        with closing(self._backend.read(self._info, file, wanted)) as messages:
            for message in messages:
                yield message[1], message

    def fingerprint(self) -> str:
        """A hash of the recording: sha256, 64 hexadecimal digits.

        It covers the storage, the topics with their types and counts, the time span, and each file's size and bytes:
        all of them up to 64 MiB, above that 256 blocks of 64 KiB spread evenly from the first byte to the last. It
        stays the same when the bag is moved, copied or renamed; a change between the sampled blocks of a large file
        that alters neither its size nor its counts goes unseen.
        """
        topics = sorted((topic.name, topic.type, topic.count) for topic in self.topics.values())
        head = [self._info.storage_id, self._info.compression, topics, self.start_ns, self.end_ns]
        digest = hashlib.sha256(json.dumps(head).encode())
        for file in self._info.files:
            size = file.path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with file.path.open("rb") as stream:
                if size <= _HASH_WHOLE:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                    continue
                for block in range(_HASH_BLOCKS):
                    stream.seek(block * (size - _HASH_BLOCK) // (_HASH_BLOCKS - 1))
                    digest.update(stream.read(_HASH_BLOCK))
        return digest.hexdigest()


def open_bag(path: str | PathLike[str], backend: BackendName | None = None) -> BagReader:
    """Opens a rosbag2 recording: a folder with metadata.yaml, or a single .mcap or .db3 file.

    Args:
        path: The folder or file.
        backend: "rosbag2_py" or "rosbags"; by default rosbag2_py where it can be imported, else rosbags.

    Raises:
        ClpError: The path is missing, the recording is invalid, empty or truncated, or the backend cannot be imported.
    """
    path = Path(path)
    if not path.exists():
        raise ClpError("the bag does not exist", where=path, hint="give the folder that `ros2 bag record` wrote")
    reading = _load_backend(backend)
    if path.is_dir():
        info = read_metadata(path)
    elif path.suffix in (".zstd", ".zst") and path.with_suffix("").suffix in SUFFIXES:
        raise part_of_compressed(path)
    elif path.suffix == ".bag":
        raise ClpError("the bag is one of ROS 1", where=path, hint=CONVERT_ROS_1)
    elif path.suffix in SUFFIXES:
        storage_id = SUFFIXES[path.suffix]
        check_whole(path, storage_id)
        info = reading.inspect(path, storage_id)
    else:
        raise ClpError(
            "the file is not a rosbag2 recording",
            where=path,
            hint="give the folder that metadata.yaml is in, or an .mcap or .db3 file",
        )
    if not any(topic.count for topic in info.topics.values()):
        raise ClpError("the bag has no messages", where=path, hint="record again, with the robot running")
    return BagReader(info, reading)


def _load_backend(name: BackendName | None) -> Backend:
    if name is not None and name not in _BACKENDS:
        raise ClpError(f"unknown backend {name!r}", where="backend", hint=f"use {' or '.join(_BACKENDS)}")
    reasons, candidates = [], (name,) if name else tuple(_BACKENDS)
    for candidate in candidates:
        module, attribute = _BACKENDS[candidate]
        try:
            return getattr(importlib.import_module(module), attribute)()
        except ImportError as error:
            reasons.append(f"{candidate}: {error}")
    raise ClpError(
        f"no library that reads bags can be imported ({'; '.join(reasons)})",
        where=", ".join(candidates),
        hint="pip install rosbags mcap, or source a ROS 2 environment that has rosbag2_py",
    )
