# SPDX-License-Identifier: Apache-2.0
"""MCAP files (https://mcap.dev/spec) as any program writes them.

rosbags' and rosbag2's readers refuse a file for what an unrelated channel holds, or find nothing in one without the
indexes that a writer may leave out. Here the summary is used where it is complete; otherwise the file is read through
once. What is not ROS is told by its channel, and left to the caller.
"""

import heapq
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import lz4.frame

from clp_ros.bags.storage_file import Channel, DamagedFile
from clp_ros.errors import ClpError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
_CHUNK_INDEX, _STATISTICS, _DATA_END = 0x08, 0x0B, 0x0F
_MAGIC_SIZE, _HEAD_SIZE, _FOOTER_SIZE = 8, 9, 20  # a record's head: its kind, and its content's length
_MESSAGE_HEAD = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
# Messages outside chunks are read in runs of this size, so that memory does not grow with the file.
_RUN_SIZE = 4 << 20


@dataclass(frozen=True)
class _Segment:
    """A chunk, or a run of messages outside chunks: its times, where it lies, and its channels (None: not known)."""

    start_ns: int
    begin: int
    end: int
    channels: frozenset[int] | None


class _Fields:
    """A record's content, read field by field."""

    def __init__(self, content: bytes | memoryview) -> None:
        self._content = memoryview(content)
        self._at = 0

    def number(self, code: str) -> int:
        """A number: struct's code "H", "I" or "Q"."""
        (value,) = struct.unpack_from(f"<{code}", self._content, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def view(self, size: int) -> memoryview:
        """The next bytes, not copied."""
        value = self._content[self._at : self._at + size]
        if len(value) != size:
            raise DamagedFile("a record is shorter than its fields")
        self._at += size
        return value

    def data(self) -> bytes:
        """Bytes behind their number."""
        return bytes(self.view(self.number("I")))

    def text(self) -> str:
        return self.data().decode(errors="replace")

    def numbers(self, code: str) -> Iterator[tuple[int, ...]]:
        return struct.iter_unpack(f"<{code}", self.data())


class McapFile:
    """An .mcap file.

    Raises:
        ClpError: It is compressed in a way that cannot be read.
        DamagedFile: It is damaged. So are struct.error, zstd.ZstdError and RuntimeError, of lz4.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb")
        self._schemas: dict[int, tuple[str, str, bytes]] = {}
        self._declared: dict[int, tuple[int, str, str]] = {}
        self._segments: list[_Segment] = []
        self._counts: Counter[int] = Counter()
        self._start_ns: int | None = None
        self._end_ns = 0
        try:
            self._open()
        except BaseException:
            self._stream.close()
            raise
        self.channels: Mapping[int, Channel] = {
            number: Channel(topic, kind, serialization, definition_format, definition)
            for number, (schema, topic, serialization) in self._declared.items()
            for kind, definition_format, definition in [self._schemas.get(schema, ("", "", b""))]
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def counts(self) -> tuple[Mapping[int, int], int, int]:
        """See :class:`clp_ros.bags.storage_file.OpenFile`."""
        return self._counts, self._start_ns or 0, self._end_ns

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """See :class:`clp_ros.bags.storage_file.OpenFile`."""
        chosen = frozenset(wanted)
        streams = [
            self._from_segment(segment, chosen)
            for segment in self._segments
            if segment.channels is None or segment.channels & chosen
        ]
        for receive_ns, message in heapq.merge(*streams, key=lambda entry: entry[0]):
            if message is not None:
                yield message[0], receive_ns, message[1]

    def _from_segment(
        self, segment: _Segment, wanted: frozenset[int]
    ) -> Iterator[tuple[int, tuple[int, bytes] | None]]:
        # The first item only says when the segment begins, so that the merge reads none before its time has come.
        yield segment.start_ns, None
        found = []
        for kind, content in self._contents(segment):
            if kind == _MESSAGE:
                channel, _, log_ns, _ = _MESSAGE_HEAD.unpack_from(content)
                if channel in wanted:
                    found.append((log_ns, channel, content[_MESSAGE_HEAD.size :]))
        found.sort(key=lambda entry: entry[0])  # stable
        for log_ns, channel, message in found:
            yield log_ns, (channel, bytes(message))

    # The file's structure.

    def _open(self) -> None:
        self._stream.seek(0, 2)
        footer = self._stream.tell() - _MAGIC_SIZE - _HEAD_SIZE - _FOOTER_SIZE
        head = self._read(footer, _HEAD_SIZE + _FOOTER_SIZE) if footer > _MAGIC_SIZE else b""
        if head[:_HEAD_SIZE] != struct.pack("<BQ", _FOOTER, _FOOTER_SIZE):
            raise DamagedFile("it does not end with a footer")
        if self._read(_MAGIC_SIZE, 1) != bytes([_HEADER]):
            raise DamagedFile("it does not begin with a header")
        _, begin = self._record(_MAGIC_SIZE, footer)
        summary, _, checksum = struct.unpack_from("<QQI", head, _HEAD_SIZE)
        if not summary:
            self._scan(begin, footer)
            return
        if not begin <= summary <= footer:
            raise DamagedFile("its summary lies outside the file")
        content = self._read(summary, footer - summary)
        if checksum and zlib.crc32(head[:-4], zlib.crc32(content)) != checksum:
            raise DamagedFile("its summary's checksum is wrong")
        if not self._use_summary(content, begin, summary):
            self._scan(begin, summary)

    def _use_summary(self, summary: bytes, begin: int, end: int) -> bool:
        """Takes channels, counts and chunks from the summary; says whether they are all of the file's."""
        indexes: list[tuple[_Segment, int]] = []
        statistics: tuple[int, ...] | None = None
        counts: dict[int, int] = {}
        for kind, content in _records(summary):
            fields = _Fields(content)
            if kind == _CHUNK_INDEX:
                start, _, offset, length = (fields.number("Q") for _ in range(4))
                channels = frozenset(channel for channel, _ in fields.numbers("HQ"))
                after = offset + length + fields.number("Q")
                indexes.append((_Segment(start, offset, offset + length, channels or None), after))
            elif kind == _STATISTICS:
                # messages, schemas, channels, attachments, metadata, chunks, first and last time
                statistics = tuple(fields.number(code) for code in "QHIIIIQQ")
                counts = dict(fields.numbers("HQ"))
            else:
                self._declare(kind, content)
        if (
            statistics is None
            or sum(counts.values()) != statistics[0]
            or not counts.keys() <= self._declared.keys()
            or any(schema and schema not in self._schemas for schema, _, _ in self._declared.values())
            or statistics[5] != len(indexes)
        ):
            return False
        at = begin
        for segment, after in sorted(indexes, key=lambda index: index[0].begin):
            if self._holds_messages(at, segment.begin):
                return False
            at = after
        if self._holds_messages(at, end):
            return False
        self._segments = [segment for segment, _ in sorted(indexes, key=lambda index: index[0].begin)]
        self._counts = Counter(counts)
        self._start_ns, self._end_ns = statistics[6], statistics[7]
        return True

    def _holds_messages(self, at: int, end: int) -> bool:
        if at > end:
            return True  # the summary contradicts itself
        while at < end:
            kind, at = self._record(at, end)
            if kind in (_MESSAGE, _CHUNK):
                return True
        return False

    def _scan(self, at: int, end: int) -> None:
        """Finds channels, counts and segments by reading the file through."""
        self._segments.clear()
        run = _Run(at)
        while at < end:
            kind, after = self._record(at, end)
            if kind == _MESSAGE:
                channel, _, log_ns, _ = _MESSAGE_HEAD.unpack(self._read(at + _HEAD_SIZE, _MESSAGE_HEAD.size))
                self._count(channel, log_ns)
                if run.channels and (run.end != at or after - run.begin > _RUN_SIZE):
                    self._segments.append(run.segment())
                    run = _Run(at)
                run.begin = run.begin if run.channels else at
                run.add(channel, log_ns, after)
            elif kind == _CHUNK:
                chunk = _Run(at)
                for inner, content in self._contents(_Segment(0, at, after, None)):
                    if inner == _MESSAGE:
                        channel, _, log_ns, _ = _MESSAGE_HEAD.unpack_from(content)
                        self._count(channel, log_ns)
                        chunk.add(channel, log_ns, after)
                    else:
                        self._declare(inner, content)
                if chunk.channels:
                    self._segments.append(chunk.segment())
            elif kind in (_SCHEMA, _CHANNEL):
                self._declare(kind, self._read(at + _HEAD_SIZE, after - at - _HEAD_SIZE))
            elif kind == _DATA_END:
                break
            at = after
        if run.channels:
            self._segments.append(run.segment())
        self._segments.sort(key=lambda segment: segment.begin)
        if unknown := sorted(self._counts.keys() - self._declared.keys()):
            raise DamagedFile(f"a message is of channel {unknown[0]}, which is declared nowhere")

    def _count(self, channel: int, log_ns: int) -> None:
        self._counts[channel] += 1
        self._start_ns = log_ns if self._start_ns is None else min(self._start_ns, log_ns)
        self._end_ns = max(self._end_ns, log_ns)

    def _declare(self, kind: int, content: bytes | memoryview) -> None:
        fields = _Fields(content)
        if kind == _SCHEMA:
            number, name, encoding, data = fields.number("H"), fields.text(), fields.text(), fields.data()
            self._schemas.setdefault(number, (name, encoding, data))
        elif kind == _CHANNEL:
            number, schema, topic, encoding = fields.number("H"), fields.number("H"), fields.text(), fields.text()
            self._declared.setdefault(number, (schema, topic, encoding))

    # Bytes.

    def _read(self, at: int, size: int) -> bytes:
        self._stream.seek(at)
        data = self._stream.read(size)
        if len(data) != size:
            raise DamagedFile(f"{size} bytes are not there at byte {at}")
        return data

    def _record(self, at: int, end: int) -> tuple[int, int]:
        """A record's kind, and where the next one begins."""
        kind, length = struct.unpack("<BQ", self._read(at, _HEAD_SIZE))
        after = at + _HEAD_SIZE + length
        if after > end:
            raise DamagedFile(f"the record at byte {at} is longer than the file")
        return kind, after

    def _contents(self, segment: _Segment) -> Iterator[tuple[int, memoryview]]:
        """The records in a chunk, or those of a run."""
        data = self._read(segment.begin, max(0, segment.end - segment.begin))
        if data[:1] == bytes([_MESSAGE]):
            return _records(data)
        if data[:1] != bytes([_CHUNK]):
            raise DamagedFile(f"no chunk is at byte {segment.begin}")
        fields = _Fields(memoryview(data)[_HEAD_SIZE:])
        _, _, size, checksum = (fields.number(code) for code in "QQQI")
        compression = fields.text()
        content = fields.view(fields.number("Q"))
        if compression == "zstd":
            content = zstd.decompress(content)
        elif compression == "lz4":
            content = lz4.frame.decompress(content)
        elif compression:
            raise ClpError(
                f"the file's chunks are compressed with {compression!r}, which cannot be read",
                where=self._path,
                fix="compress it anew: mcap compress --compression zstd",
            )
        if len(content) != size or (checksum and zlib.crc32(content) != checksum):
            raise DamagedFile(f"the chunk at byte {segment.begin} does not fit its checksum")
        return _records(content)


class _Run:
    """What a segment is gathered from."""

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self.channels: set[int] = set()
        self._start_ns = 0

    def add(self, channel: int, log_ns: int, end: int) -> None:
        self._start_ns = min(self._start_ns, log_ns) if self.channels else log_ns
        self.channels.add(channel)
        self.end = end

    def segment(self) -> _Segment:
        return _Segment(self._start_ns, self.begin, self.end, frozenset(self.channels))


def _records(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    view, at = memoryview(data), 0
    while at < len(view):
        kind, length = struct.unpack_from("<BQ", view, at)
        at += _HEAD_SIZE
        if at + length > len(view):
            raise DamagedFile("a record is longer than what holds it")
        yield kind, view[at : at + length]
        at += length
