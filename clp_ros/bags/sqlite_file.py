# SPDX-License-Identifier: Apache-2.0
"""Reads rosbag2's sqlite3 files of every schema version with Python's sqlite3."""

import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

from clp_ros.bags.storage_file import Channel, DamagedFileError
from clp_ros.core.errors import ClpError


class SqliteFile:
    """A .db3 file, opened read-only. No file is created beside it.

    Raises:
        ClpError: The database is not a recording.
        DamagedFileError: The file is damaged.
        sqlite3.Error: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.channels: Mapping[int, Channel] = {}
        # With `immutable`, sqlite3 makes no -shm file. check_whole has refused a database whose log is not empty.
        location = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        self._database = sqlite3.connect(location, uri=True, check_same_thread=False)
        try:
            self.channels = self._read_channels(path)
        except BaseException:
            self._database.close()
            raise

    def _read_channels(self, path: Path) -> dict[int, Channel]:
        query = self._database.execute
        tables = {name for (name,) in query("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"topics", "messages"} <= tables:
            raise ClpError(
                "the database is not a rosbag2 recording: it has no table of messages",
                where=path,
                hint="give the bag that `ros2 bag record` wrote",
            )
        definitions: dict[str, tuple[str, bytes]] = {}
        if "message_definitions" in tables:  # since schema version 4
            rows = query("SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")
            definitions = {kind: (str(encoding), _bytes(definition)) for kind, encoding, definition in rows}
        topics = query("SELECT id, name, type, serialization_format FROM topics ORDER BY id")
        return {
            number: Channel(str(name), str(kind), str(serialization), *definitions.get(kind, ("", b"")))
            for number, name, kind, serialization in topics
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def counts(self) -> tuple[Mapping[int, int], int, int]:
        """See :class:`clp_ros.bags.storage_file.OpenFile`."""
        rows = self._database.execute(
            "SELECT topic_id, COUNT(*), MIN(timestamp), MAX(timestamp) FROM messages GROUP BY topic_id"
        ).fetchall()
        if not rows:
            return {}, 0, 0
        return {row[0]: row[1] for row in rows}, min(row[2] for row in rows), max(row[3] for row in rows)

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """See :class:`clp_ros.bags.storage_file.OpenFile`."""
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({marks}) ORDER BY timestamp, rowid"
        for channel, receive_ns, data in self._database.execute(query, list(wanted)):
            if not isinstance(receive_ns, int):
                raise DamagedFileError("the time of a message is not a number")
            yield channel, receive_ns, _bytes(data)


def _bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise DamagedFileError("a message or a definition has no bytes")
    return value
