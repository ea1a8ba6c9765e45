# SPDX-License-Identifier: Apache-2.0
"""Reads MCAP files (https://mcap.dev/spec) of any writer. The mcap package parses records and decompresses chunks.

The package's readers of whole files are not used. They refuse a file if any channel's text is not UTF-8. Without a
chunk index they sort all messages in memory; with one they miss messages outside chunks. This module therefore decides
which parts of a file are read: it uses the summary if that is complete, otherwise it reads the file through once.
Channels that do not hold ROS 2 messages are listed as well; the caller decides about them.
"""

import heapq
import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from mcap import records
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.reader import FOOTER_SIZE
from mcap.stream_reader import MAGIC_SIZE, get_chunk_data_stream

from clp_ros.bags.storage_file import Channel, DamagedFileError
from clp_ros.core.errors import ClpError

_HEAD = struct.Struct("<BQ")  # a record begins with its kind and the length of its content
_MESSAGE_FIELDS_SIZE = 22  # channel, sequence, log time and publish time, before the data
# Messages outside chunks are read in runs of this size, so that memory does not grow with the file.
_RUN_SIZE = 4 << 20
_PARSERS: dict[int, Callable[[ReadDataStream], records.McapRecord]] = {
    Opcode.SCHEMA: records.Schema.read,
    Opcode.CHANNEL: records.Channel.read,
    Opcode.CHUNK: records.Chunk.read,
    Opcode.CHUNK_INDEX: records.ChunkIndex.read,
    Opcode.STATISTICS: records.Statistics.read,
}


@dataclass(frozen=True)
class _Segment:
    """A chunk, or a run of messages outside chunks.

    Attributes:
        start_ns: Log time of its earliest message, nanoseconds.
        begin: Offset of its first byte in the file.
        end: Offset behind its last byte.
        channels: Channels of its messages; empty if the file does not list them.
    """

    start_ns: int
    begin: int
    end: int
    channels: frozenset[int]


class McapFile:
    """An .mcap file.

    Raises:
        ClpError: The compression cannot be read.
        DamagedFileError: The file is damaged. mcap's McapError and struct.error mean the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schemas: dict[int, records.Schema] = {}
        self._declared: dict[int, records.Channel] = {}
        self._segments: list[_Segment] = []
        self._counts: Counter[int] = Counter()
        self._start_ns: int | None = None
        self._end_ns = 0
        self._stream = path.open("rb")
        try:
            self._open()
        except BaseException:
            self._stream.close()
            raise
        nothing = records.Schema(id=0, data=b"", encoding="", name="")
        self.channels: Mapping[int, Channel] = {
            number: Channel(channel.topic, schema.name, channel.message_encoding, schema.encoding, schema.data)
            for number, channel in self._declared.items()
            for schema in [self._schemas.get(channel.schema_id, nothing)]
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            if not segment.channels or segment.channels & chosen
        ]
        for receive_ns, message in heapq.merge(*streams, key=lambda entry: entry[0]):
            if message is not None:
                yield message.channel_id, receive_ns, message.data

    def _from_segment(self, segment: _Segment, wanted: frozenset[int]) -> Iterator[tuple[int, records.Message | None]]:
        # The first item carries the start time only: the merge then reads a segment no earlier than it needs to.
        yield segment.start_ns, None
        found = [
            record
            for place in _places(self._stream, segment.begin, segment.end)
            for record in self._parse(self._stream, *place)
            if isinstance(record, records.Message) and record.channel_id in wanted
        ]
        found.sort(key=lambda message: message.log_time)  # stable
        for message in found:
            yield message.log_time, message

    def _open(self) -> None:
        size = self._stream.seek(0, io.SEEK_END)
        end = size - MAGIC_SIZE - FOOTER_SIZE
        if end < MAGIC_SIZE:
            raise DamagedFileError("it does not end with a footer")
        ((kind, _, after),) = _places(self._stream, end, size - MAGIC_SIZE)
        if kind != Opcode.FOOTER:
            raise DamagedFileError("it does not end with a footer")
        footer = records.Footer.read(_Stream(self._stream))
        if not footer.summary_start:
            self._scan(end)
            return
        if not MAGIC_SIZE <= footer.summary_start <= end:
            raise DamagedFileError("its summary lies outside the file")
        self._stream.seek(footer.summary_start)
        checksum = zlib.crc32(self._stream.read(after - 4 - footer.summary_start))
        if footer.summary_crc not in (0, checksum):
            raise DamagedFileError("its summary's checksum is wrong")
        if not self._use_summary(footer.summary_start, end):
            self._scan(footer.summary_start)

    def _use_summary(self, summary: int, end: int) -> bool:
        """Takes channels, counts and chunks from the summary; returns whether the summary is complete."""
        statistics: records.Statistics | None = None
        indexes: list[records.ChunkIndex] = []
        for kind, at, after in _places(self._stream, summary, end):
            for record in self._parse(self._stream, kind, at, after):
                self._declare(record)
                if isinstance(record, records.Statistics):
                    statistics = record
                elif isinstance(record, records.ChunkIndex):
                    indexes.append(record)
        if (
            statistics is None
            or sum(statistics.channel_message_counts.values()) != statistics.message_count
            or not statistics.channel_message_counts.keys() <= self._declared.keys()
            or not {channel.schema_id for channel in self._declared.values()} <= {0, *self._schemas}
            or statistics.chunk_count != len(indexes)
        ):
            return False
        at = MAGIC_SIZE
        segments = []
        for index in sorted(indexes, key=lambda index: index.chunk_start_offset):
            begin, after = index.chunk_start_offset, index.chunk_start_offset + index.chunk_length
            if self._holds_messages(at, begin):
                return False
            at = after + index.message_index_length
            segments.append(_Segment(index.message_start_time, begin, after, frozenset(index.message_index_offsets)))
        if self._holds_messages(at, summary):
            return False
        self._segments = segments
        self._counts = Counter(statistics.channel_message_counts)
        self._start_ns, self._end_ns = statistics.message_start_time, statistics.message_end_time
        return True

    def _holds_messages(self, at: int, end: int) -> bool:
        # If at > end, the summary contradicts itself and cannot be used.
        return at > end or any(kind in (Opcode.MESSAGE, Opcode.CHUNK) for kind, _, _ in _places(self._stream, at, end))

    def _scan(self, end: int) -> None:
        """Finds channels, counts and segments by reading the file through."""
        run: _Segment | None = None  # the last segment, if it is one of messages outside chunks
        for kind, at, after in _places(self._stream, MAGIC_SIZE, end):
            if kind == Opcode.DATA_END:
                break
            # The data of a message outside chunks is not needed here.
            needed = at + _HEAD.size + _MESSAGE_FIELDS_SIZE if kind == Opcode.MESSAGE else after
            found = []
            for record in self._parse(self._stream, kind, at, needed):
                self._declare(record)
                if isinstance(record, records.Message):
                    found.append((record.channel_id, record.log_time))
            if not found:
                continue
            numbers, times = zip(*found, strict=True)
            self._counts.update(numbers)
            self._start_ns = min(times) if self._start_ns is None else min(self._start_ns, *times)
            self._end_ns = max(self._end_ns, *times)
            segment = _Segment(min(times), at, after, frozenset(numbers))
            if run and kind == Opcode.MESSAGE and after - run.begin <= _RUN_SIZE:
                self._segments.pop()
                segment = _Segment(min(run.start_ns, *times), run.begin, after, run.channels | segment.channels)
            self._segments.append(segment)
            run = segment if kind == Opcode.MESSAGE else None
        if unknown := sorted(self._counts.keys() - self._declared.keys()):
            raise DamagedFileError(f"a message is of channel {unknown[0]}, which is declared nowhere")

    def _declare(self, record: records.McapRecord) -> None:
        if isinstance(record, records.Schema):
            self._schemas.setdefault(record.id, record)
        elif isinstance(record, records.Channel):
            self._declared.setdefault(record.id, record)

    def _parse(self, source: BinaryIO, kind: int, at: int, after: int) -> Iterator[records.McapRecord]:
        """Yields the record, or the records inside if it is a chunk; skips kinds that are not needed."""
        source.seek(at + _HEAD.size)
        stream = _Stream(source)
        if kind == Opcode.MESSAGE:
            yield records.Message.read(stream, after - at - _HEAD.size)
        elif kind in _PARSERS:
            record = _PARSERS[kind](stream)
            if source.tell() > after:
                raise DamagedFileError(f"the record at byte {at} is shorter than its fields")
            if isinstance(record, records.Chunk):
                data = self._decompress(record)
                inside = io.BytesIO(data)
                for place in _places(inside, 0, len(data)):
                    yield from self._parse(inside, *place)
            else:
                yield record

    def _decompress(self, chunk: records.Chunk) -> bytes:
        if chunk.compression not in ("", "lz4", "zstd"):  # the package would read it as uncompressed
            raise ClpError(
                f"the chunks are compressed with {chunk.compression!r}, which cannot be read",
                where=self._path,
                hint="compress the file again: mcap compress --compression zstd",
            )
        try:
            stream, size = get_chunk_data_stream(chunk, validate_crc=True)
        except Exception as error:  # each decompressor raises its own exceptions
            raise DamagedFileError(f"a chunk: {error}") from error
        if size != chunk.uncompressed_size:
            raise DamagedFileError(f"a chunk holds {size} bytes, not {chunk.uncompressed_size}")
        return stream.read(size)


class _Stream(ReadDataStream):
    """The package's stream, but a short read raises DamagedFileError, and text that is not UTF-8 does not raise."""

    def read(self, length: int) -> bytes:
        data = super().read(length)
        if len(data) != length:
            raise DamagedFileError("a record is shorter than its fields")
        return data

    def read_prefixed_string(self) -> str:
        return self.read(self.read4()).decode(errors="replace")


def _places(source: BinaryIO, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields kind, begin and end of each record without reading its content."""
    while at < end:
        source.seek(at)
        kind, length = _HEAD.unpack(source.read(_HEAD.size))
        after = at + _HEAD.size + length
        if after > end:
            raise DamagedFileError(f"the record at byte {at} is longer than what holds it")
        yield kind, at, after
        at = after
