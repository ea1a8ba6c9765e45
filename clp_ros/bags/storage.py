# SPDX-License-Identifier: Apache-2.0
"""The interface of the two backends that read storage files."""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, Protocol

from clp_ros.bags.metadata import BagInfo, StorageFile


class CorruptMessageError(Exception):
    """The bytes of one message cannot be deserialized. The following messages can still be read."""


class Backend(Protocol):
    """A library that reads single storage files. :class:`clp_ros.bags.reader.BagReader` merges files and counts
    messages."""

    name: str

    def inspect(self, path: Path, storage_id: str) -> BagInfo:
        """Describes a single storage file. Raises ClpError if the file cannot be read."""

    def read(self, bag: BagInfo, file: StorageFile, topics: Collection[str]) -> Generator[tuple[str, int, bytes]]:
        """Yields (topic, receive_ns, serialized message) of one file in receive order. Raises ClpError if it is
        damaged."""

    def decode(self, bag: BagInfo, message_type: str, raw: bytes) -> Any:
        """Deserializes a message. Raises CorruptMessageError for wrong bytes, ClpError for an unknown type."""
