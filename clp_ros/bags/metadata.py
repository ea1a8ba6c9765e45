# SPDX-License-Identifier: Apache-2.0
"""Reads a rosbag2 recording's metadata and checks that its files are complete. Needs neither ROS nor a bag library."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, Field

from clp_ros.bags.names import absolute_topic, full_type
from clp_ros.core.errors import ClpError

SUFFIXES = {".mcap": "mcap", ".db3": "sqlite3"}
"""Suffix of a storage file -> rosbag2 storage id."""

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_SQLITE_MAGIC = b"SQLite format 3\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""The first bytes of zstd data. A CDR message begins with a zero byte."""
CONVERT_ROS_1 = "convert it: rosbags-convert --src IN.bag --dst OUT"
_KINDS = {
    _MCAP_MAGIC: ("an mcap file", "name it .mcap, with storage_identifier: mcap in metadata.yaml"),
    _SQLITE_MAGIC: ("an sqlite3 file", "name it .db3, with storage_identifier: sqlite3 in metadata.yaml"),
    b"#ROSBAG": ("a ROS 1 bag", CONVERT_ROS_1),
    b"version https://git-lfs": ("a Git LFS pointer", "fetch the file: git lfs pull"),
}
_REINDEX = (
    "its recorder was killed or the copy is incomplete: copy it again, or repair it (mcap recover, ros2 bag reindex)"
)


@dataclass(frozen=True)
class Topic:
    """A recorded topic.

    Attributes:
        name: With a leading slash, whether or not it was recorded with one.
        type: In three parts, "sensor_msgs/msg/Image".
        count: Number of its messages in the bag.
        fault: Why it cannot be read, or "".
        hint: What to do about the fault.
    """

    name: str
    type: str
    count: int
    fault: str = ""
    hint: str = ""


@dataclass(frozen=True)
class StorageFile:
    """One storage file of a bag; ``start_ns`` is its first receive time, None where the metadata does not say."""

    path: Path
    start_ns: int | None


@dataclass(frozen=True)
class BagInfo:
    """Describes a bag before any message is read.

    Attributes:
        path: The folder, or the single storage file.
        storage_id: "mcap" or "sqlite3".
        compression: "" (none), "file" (each file is a .zstd) or "message" (each message is zstd data).
        topics: By name, in the recording's order.
        start_ns: Receive time of the first message, nanoseconds.
        end_ns: Receive time of the last message, nanoseconds.
        files: In recording order.
        document: metadata.yaml's content, empty for a single file.
    """

    path: Path
    storage_id: str
    compression: Literal["", "file", "message"]
    topics: Mapping[str, Topic]
    start_ns: int
    end_ns: int
    files: tuple[StorageFile, ...]
    document: Mapping[str, Any] = field(repr=False, default_factory=dict)


class _Duration(BaseModel):
    nanoseconds: int


class _Time(BaseModel):
    nanoseconds_since_epoch: int


class _TopicMetadata(BaseModel):
    name: str
    type: str
    serialization_format: str


class _TopicCount(BaseModel):
    topic_metadata: _TopicMetadata
    message_count: int = Field(ge=0)


class _File(BaseModel):
    path: str
    starting_time: _Time


class _Metadata(BaseModel):
    """The keys of rosbag2's metadata.yaml (versions 1 to 9) that reading needs."""

    storage_identifier: str
    relative_file_paths: list[str] = Field(min_length=1)
    duration: _Duration
    starting_time: _Time
    message_count: int
    topics_with_message_count: list[_TopicCount]
    compression_format: str | None = None
    compression_mode: str | None = None
    files: list[_File] = []


def read_metadata(folder: Path) -> BagInfo:
    """Reads ``folder/metadata.yaml`` and checks the files it names.

    Raises:
        ClpError: No or invalid metadata.yaml, unknown storage or compression, a storage file missing or cut off.
    """
    path = folder / "metadata.yaml"
    if not path.is_file():
        parts = sorted(part.name for part in folder.iterdir() if SUFFIXES.keys() & {*part.suffixes})
        if parts:
            raise ClpError(
                f"metadata.yaml is missing beside {parts[0]}: the recorder was killed, or the file was not copied",
                where=folder,
                hint=f"run `ros2 bag reindex` on the folder, or give {parts[0]} itself",
            )
        inside = sorted(child.name for child in folder.iterdir() if (child / "metadata.yaml").is_file())
        raise ClpError(
            "the folder is not a rosbag2 recording: it has no metadata.yaml",
            where=folder,
            hint=f"give the recordings in it: {', '.join(inside)}"
            if inside
            else "give the folder that `ros2 bag record` wrote, or an .mcap or .db3 file",
        )
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        metadata = _Metadata.model_validate(document["rosbag2_bagfile_information"])
    # ValueError: a ValidationError, text that is not UTF-8, or an invalid date.
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ClpError(
            f"the bag's metadata cannot be read ({error})", where=path, hint="run `ros2 bag reindex`"
        ) from error

    storage_id = metadata.storage_identifier
    if storage_id not in SUFFIXES.values():
        raise ClpError(
            f"unknown storage id {storage_id!r}", where=path, hint="convert it to mcap with `ros2 bag convert`"
        )
    mode = (metadata.compression_mode or "").lower()
    compression = "" if mode == "none" else mode
    if compression not in ("", "file", "message") or (compression and metadata.compression_format != "zstd"):
        raise ClpError(
            f"unknown compression (mode {mode!r}, format {metadata.compression_format!r})",
            where=path,
            hint="convert it with `ros2 bag convert`; zstd by file or by message is read",
        )

    topics = collect_topics(
        (
            entry.topic_metadata.name,
            entry.topic_metadata.type,
            entry.topic_metadata.serialization_format,
            entry.message_count,
        )
        for entry in metadata.topics_with_message_count
    )

    starts = {PurePath(entry.path).name: entry.starting_time.nanoseconds_since_epoch for entry in metadata.files}
    # Only the file names are used: until version 3, the paths began with the folder's name, which may have changed.
    names = [PurePath(name).name for name in metadata.relative_file_paths]
    files = tuple(StorageFile(folder / name, starts.get(name)) for name in names)
    if metadata.message_count > 0:  # without messages, `ros2 bag record` may leave empty files
        for file in files:
            check_whole(file.path, "zstd" if compression == "file" else storage_id)
    start_ns = metadata.starting_time.nanoseconds_since_epoch
    return BagInfo(
        path=folder,
        storage_id=storage_id,
        compression=cast(Literal["", "file", "message"], compression),
        topics=topics,
        start_ns=start_ns,
        end_ns=start_ns + metadata.duration.nanoseconds,
        files=files,
        document=document,
    )


def collect_topics(entries: Iterable[tuple[str, str, str, int]]) -> dict[str, Topic]:
    """Gathers (name, type, serialization format, count) entries by topic.

    A topic that cannot be read gets a fault. The bag is not refused: the caller may not need that topic.
    """
    topics: dict[str, Topic] = {}
    for recorded, recorded_type, serialization, count in entries:
        topic = _topic(absolute_topic(recorded), full_type(recorded_type), serialization, count)
        known = topics.get(topic.name)
        if known is None or not known.count:
            topics[topic.name] = topic
        elif count and known.type == topic.type:
            fault = topic if topic.fault else known
            topics[topic.name] = replace(fault, count=known.count + count)
        elif count:
            topics[topic.name] = replace(
                known,
                count=known.count + count,
                fault=f"was recorded with two types, {known.type} and {topic.type}",
                hint="record it again, or leave one out with `ros2 bag convert`",
            )
    return topics


def _topic(name: str, message_type: str, serialization: str, count: int) -> Topic:
    if not message_type:
        return Topic(name, "", count, "was recorded without its type", "record it again, with its schema")
    if serialization == "cdr":
        return Topic(name, message_type, count)
    if serialization == "ros1":
        return Topic(name, message_type, count, "has messages of ROS 1", f"{CONVERT_ROS_1}, with the original .bag")
    what = f"is serialized as {serialization!r}, not cdr"
    return Topic(name, message_type, count, what, "record the topic with `ros2 bag record`")


def check_whole(path: Path, kind: str) -> None:
    """Checks that a storage file exists and is not truncated, without reading its content.

    Some libraries would read a truncated file as a shorter recording.

    Args:
        path: The storage file.
        kind: "mcap", "sqlite3" or "zstd".

    Raises:
        ClpError: The file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise ClpError("the file is named in metadata.yaml and missing", where=path, hint="copy the whole folder again")
    if kind == "sqlite3":
        _check_closed_sqlite(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(100)
            size = stream.seek(0, 2)
            stream.seek(max(0, size - len(_MCAP_MAGIC)))
            tail = stream.read()
    except OSError as error:
        raise ClpError(
            f"the file cannot be read ({error.strerror})", where=path, hint="check its permissions"
        ) from error
    magic = {"mcap": _MCAP_MAGIC, "sqlite3": _SQLITE_MAGIC, "zstd": ZSTD_MAGIC}[kind]
    if not head.startswith(magic):
        if magic.startswith(head):
            raise ClpError(f"truncated bag: the {kind} file has no content", where=path, hint=_REINDEX)
        if head.startswith(ZSTD_MAGIC):
            raise part_of_compressed(path)
        other, hint = next((known for start, known in _KINDS.items() if head.startswith(start)), ("", ""))
        raise ClpError(
            f"the file is not {kind}" + (f" but {other}" if other else ""),
            where=path,
            hint=hint or "give the bag that `ros2 bag record` wrote",
        )
    if kind == "mcap" and (tail != _MCAP_MAGIC or size < 2 * len(_MCAP_MAGIC)):
        raise ClpError("truncated bag: the mcap file has no end", where=path, hint=_REINDEX)
    if kind == "sqlite3":
        # https://www.sqlite.org/fileformat2.html, section 1.3: the page count is valid if offsets 24 and 92 agree.
        page_size = int.from_bytes(head[16:18], "big")
        pages = int.from_bytes(head[28:32], "big")
        counted = len(head) == 100 and head[24:28] == head[92:96]
        if len(head) < 100 or (counted and size < pages * (65536 if page_size == 1 else page_size)):
            raise ClpError("truncated bag: the sqlite3 file is shorter than its header says", where=path, hint=_REINDEX)


def part_of_compressed(path: Path) -> ClpError:
    """Returns the error for a single file of a compressed bag."""
    return ClpError(
        "the file belongs to a compressed bag",
        where=path,
        hint=f"give the folder that metadata.yaml is in: {path.parent}",
    )


def _check_closed_sqlite(path: Path) -> None:
    for suffix in ("-wal", "-journal"):
        log = path.with_name(path.name + suffix)
        if log.is_file() and log.stat().st_size:
            raise ClpError(
                "the recording was not closed: part of it is still in sqlite3's log",
                where=log,
                hint=f"keep a copy, then let sqlite3 finish it: sqlite3 {path.name} 'PRAGMA journal_mode=DELETE'",
            )
