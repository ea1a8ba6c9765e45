# SPDX-License-Identifier: Apache-2.0
"""The common interface of the two storage formats: channels, and messages in the order of their times."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self


class DamagedFileError(Exception):
    """The bytes of a storage file are not valid in its format."""


@dataclass(frozen=True)
class Channel:
    """A storage file's description of one topic's messages of one type.

    Attributes:
        topic: As recorded, with or without a leading slash.
        type: As recorded: "sensor_msgs/msg/Image", "sensor_msgs/Image", or "" if there is none.
        serialization: "cdr" for ROS 2 messages; others are "json", "protobuf" and "ros1".
        definition_format: "ros2msg", "ros2idl", "omgidl", or any other text.
        definition: The message definition, as in the file.
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

    def __exit__(self, *_: object) -> None: ...

    def counts(self) -> tuple[Mapping[int, int], int, int]:
        """Returns the number of messages by channel, and the times of the first and the last message, in
        nanoseconds."""

    def messages(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yields (channel, receive time in ns, serialized message), by time; equal times keep the recorded order."""
