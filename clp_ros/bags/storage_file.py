# SPDX-License-Identifier: Apache-2.0
"""What the two storage formats have in common for a reader: channels, and messages in the order of their times."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


class DamagedFile(Exception):  # noqa: N818 - it says what is wrong with a file, not with the program
    """A storage file's bytes contradict its format."""


@dataclass(frozen=True)
class Channel:
    """What a storage file says of one topic's messages of one type.

    Attributes:
        topic: As recorded, with or without a leading slash.
        type: As recorded: "sensor_msgs/msg/Image", "sensor_msgs/Image", or "" where none is.
        serialization: "cdr" for ROS 2's own; "json", "protobuf", "ros1" are others.
        definition_format: "ros2msg", "ros2idl", "omgidl", or anything that another program writes.
        definition: The message definition as it lies in the file.
    """

    topic: str
    type: str
    serialization: str
    definition_format: str
    definition: bytes


class OpenFile(Protocol):
    """A storage file, open for reading."""

    channels: Mapping[int, Channel]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def counts(self) -> tuple[Mapping[int, int], int, int]:
        """Number of messages by channel, and the times of the first and the last of all, nanoseconds."""

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yields (channel, receive time in ns, serialized message), by time; equal times keep the recorded order."""
