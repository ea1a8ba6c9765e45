# SPDX-License-Identifier: Apache-2.0
"""What reading one storage file takes: the interface of the two backends."""

from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any, Protocol

from clp_ros.bags.metadata import BagInfo, StorageFile


class CorruptMessage(Exception):  # noqa: N818 - it is a message, not an error of the program
    """One message's bytes cannot be deserialized; the recording goes on."""


class Backend(Protocol):
    """A library that reads storage files. It knows nothing of splits, order between files, counts or drops."""

    name: str

    def inspect(self, path: Path, storage_id: str) -> BagInfo:
        """Describes a single storage file; ClpError where it cannot be read."""

    def read(self, bag: BagInfo, file: StorageFile, topics: Collection[str]) -> Generator[tuple[str, int, bytes]]:
        """Yields (topic, receive_ns, serialized message) of one file in receive order; ClpError where it is damaged."""

    def decode(self, bag: BagInfo, message_type: str, raw: bytes) -> Any:
        """Deserializes a message: CorruptMessage where its bytes are wrong, ClpError where its type is unknown."""
