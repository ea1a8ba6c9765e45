# SPDX-License-Identifier: Apache-2.0
"""MCAP files (https://mcap.dev/spec) as any program writes them: the mcap package reads records, chunks and summaries.

Its readers of whole files are not used. Without a chunk index they hold all messages in memory to sort them; with one they
pass over messages outside chunks. Which parts of a file are read is decided here: by the summary where it is complete,
otherwise by one pass through the file. What is not ROS is told by its channel, and left to the caller.
"""

import heapq
import io
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mcap import records
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.reader import FOOTER_SIZE, SeekingReader
from mcap.stream_reader import MAGIC_SIZE, breakup_chunk
from mcap.summary import Summary

from clp_ros.bags.storage_file import Channel, DamagedFile
from clp_ros.errors import ClpError

_HEAD = struct.Struct("<BQ")  # of a record: its kind, and its content's length
# Messages outside chunks are read in runs of this size, so that memory does not grow with the file.
_RUN_SIZE = 4 << 20


@dataclass(frozen=True)
class _Segment:
    """A chunk, or a run of messages outside chunks: its times, where it lies, and its channels (None: not known)."""

    start_ns: int
    begin: int
    end: int
    channels: frozenset[int] | None


class McapFile:
    """An .mcap file.

    Raises:
        ClpError: It is compressed in a way that cannot be read.
        DamagedFile: It is damaged. So are mcap's McapError, struct.error, and ValueError.
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
        nothing = records.Schema(0, b"", "", "")
        self.channels: Mapping[int, Channel] = {
            number: Channel(channel.topic, schema.name, channel.message_encoding, schema.encoding, schema.data)
            for number, channel in self._declared.items()
            for schema in [self._schemas.get(channel.schema_id, nothing)]
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
                yield message.channel_id, receive_ns, message.data

    def _from_segment(self, segment: _Segment, wanted: frozenset[int]) -> Iterator[tuple[int, records.Message | None]]:
        # The first item only says when the segment begins, so that the merge reads none before its time has come.
        yield segment.start_ns, None
        found = [
            record
            for place in self._places(segment.begin, segment.end)
            for record in self._parse(*place)
            if isinstance(record, records.Message) and record.channel_id in wanted
        ]
        found.sort(key=lambda message: message.log_time)  # stable
        for message in found:
            yield message.log_time, message

    def _open(self) -> None:
        size = self._stream.seek(0, io.SEEK_END)
        end = size - MAGIC_SIZE - FOOTER_SIZE
        if end < MAGIC_SIZE:
            raise DamagedFile("it does not end with a footer")
        self._stream.seek(end)
        tail = self._stream.read(FOOTER_SIZE)
        if _HEAD.unpack_from(tail) != (Opcode.FOOTER, FOOTER_SIZE - _HEAD.size):
            raise DamagedFile("it does not end with a footer")
        footer = records.Footer.read(ReadDataStream(io.BytesIO(tail[_HEAD.size :])))
        if not footer.summary_start:
            self._scan(end)
            return
        if not MAGIC_SIZE <= footer.summary_start <= end:
            raise DamagedFile("its summary lies outside the file")
        self._stream.seek(footer.summary_start)
        checksum = zlib.crc32(self._stream.read(size - MAGIC_SIZE - 4 - footer.summary_start))
        if footer.summary_crc not in (0, checksum):  # the package does not look at it
            raise DamagedFile("its summary's checksum is wrong")
        self._stream.seek(0)
        summary = SeekingReader(self._stream, record_size_limit=size).get_summary()
        if summary is None or not self._use_summary(summary, footer.summary_start):
            self._scan(footer.summary_start)

    def _use_summary(self, summary: Summary, end: int) -> bool:
        """Takes channels, counts and chunks from the summary; says whether they are all of the file's."""
        statistics = summary.statistics
        if (
            statistics is None
            or sum(statistics.channel_message_counts.values()) != statistics.message_count
            or not statistics.channel_message_counts.keys() <= summary.channels.keys()
            or not {channel.schema_id for channel in summary.channels.values()} <= {0, *summary.schemas}
            or statistics.chunk_count != len(summary.chunk_indexes)
        ):
            return False
        at = MAGIC_SIZE
        segments = []
        for index in sorted(summary.chunk_indexes, key=lambda index: index.chunk_start_offset):
            begin, after = index.chunk_start_offset, index.chunk_start_offset + index.chunk_length
            if self._holds_messages(at, begin):
                return False
            at = after + index.message_index_length
            channels = frozenset(index.message_index_offsets) or None
            segments.append(_Segment(index.message_start_time, begin, after, channels))
        if self._holds_messages(at, end):
            return False
        self._segments, self._schemas, self._declared = segments, summary.schemas, summary.channels
        self._counts = Counter(statistics.channel_message_counts)
        self._start_ns, self._end_ns = statistics.message_start_time, statistics.message_end_time
        return True

    def _holds_messages(self, at: int, end: int) -> bool:
        # at > end: the summary contradicts itself
        return at > end or any(kind in (Opcode.MESSAGE, Opcode.CHUNK) for kind, _, _ in self._places(at, end))

    def _scan(self, end: int) -> None:
        """Finds channels, counts and segments by reading the file through."""
        run: _Segment | None = None  # the last segment, if it is one of messages outside chunks
        for kind, at, after in self._places(MAGIC_SIZE, end):
            if kind == Opcode.DATA_END:
                break
            messages = []
            for record in self._parse(kind, at, after):
                if isinstance(record, records.Message):
                    messages.append(record)
                elif isinstance(record, records.Schema):
                    self._schemas.setdefault(record.id, record)
                elif isinstance(record, records.Channel):
                    self._declared.setdefault(record.id, record)
            if not messages:
                continue
            self._counts.update(message.channel_id for message in messages)
            times = [message.log_time for message in messages]
            self._start_ns = min(times) if self._start_ns is None else min(self._start_ns, *times)
            self._end_ns = max(self._end_ns, *times)
            segment = _Segment(min(times), at, after, frozenset(message.channel_id for message in messages))
            if run and kind == Opcode.MESSAGE and after - run.begin <= _RUN_SIZE:
                self._segments.pop()
                channels = (run.channels or frozenset()) | (segment.channels or frozenset())
                segment = _Segment(min(run.start_ns, segment.start_ns), run.begin, after, channels)
            self._segments.append(segment)
            run = segment if kind == Opcode.MESSAGE else None
        if unknown := sorted(self._counts.keys() - self._declared.keys()):
            raise DamagedFile(f"a message is of channel {unknown[0]}, which is declared nowhere")

    def _places(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Kind, begin and end of each record at the file's top level; what is in them is not read."""
        while at < end:
            self._stream.seek(at)
            kind, length = _HEAD.unpack(self._stream.read(_HEAD.size))
            after = at + _HEAD.size + length
            if after > end:
                raise DamagedFile(f"the record at byte {at} is longer than the file")
            yield kind, at, after
            at = after

    def _parse(self, kind: int, at: int, after: int) -> list[records.McapRecord]:
        """A message, schema or channel; all of them that a chunk holds; none of another record."""
        self._stream.seek(at + _HEAD.size)
        stream = ReadDataStream(self._stream)
        found: list[records.McapRecord] = []
        if kind == Opcode.CHUNK:
            found = self._break_up(records.Chunk.read(stream))
        elif kind == Opcode.MESSAGE:
            found = [records.Message.read(stream, after - at - _HEAD.size)]
        elif kind == Opcode.SCHEMA:
            found = [records.Schema.read(stream)]
        elif kind == Opcode.CHANNEL:
            found = [records.Channel.read(stream)]
        if self._stream.tell() > after:
            raise DamagedFile(f"the record at byte {at} is shorter than its fields")
        return found

    def _break_up(self, chunk: records.Chunk) -> list[records.McapRecord]:
        if chunk.compression not in ("", "lz4", "zstd"):  # the package takes it for none
            raise ClpError(
                f"the file's chunks are compressed with {chunk.compression!r}, which cannot be read",
                where=self._path,
                fix="compress it anew: mcap compress --compression zstd",
            )
        try:
            return breakup_chunk(chunk, validate_crc=True)
        except McapError:
            raise
        except Exception as error:  # each decompressor has its own kind
            raise DamagedFile(str(error)) from error
