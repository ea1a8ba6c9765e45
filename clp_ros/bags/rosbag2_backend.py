# SPDX-License-Identifier: Apache-2.0
"""Reads storage files with ROS 2's ``rosbag2_py``. Imported only where rosbag2_py is installed."""

import tempfile
from collections.abc import Collection, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rosbag2_py
import yaml
from rclpy.serialization import deserialize_message
from rosidl_runtime_py.utilities import get_message

from clp_ros.bags.metadata import BagInfo, StorageFile, collect_topics
from clp_ros.bags.names import absolute_topic
from clp_ros.bags.storage import CorruptMessageError
from clp_ros.core.errors import ClpError

# Written against rosbag2's jazzy branch: rosbag2_py/src/rosbag2_py/_reader.cpp, _storage.cpp.
_CDR = rosbag2_py.ConverterOptions(input_serialization_format="cdr", output_serialization_format="cdr")
# pybind11 translates the storages' C++ exceptions into these.
_UNREADABLE = (RuntimeError, ValueError, LookupError, MemoryError)


class Rosbag2Backend:
    """Reads storage files with ``rosbag2_py``; message classes come from the sourced ROS 2 workspace."""

    name = "rosbag2_py"

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def inspect(self, path: Path, storage_id: str) -> BagInfo:
        """Describes a single storage file, from the file's index.

        Raises:
            ClpError: The file cannot be read.
        """
        try:
            metadata = rosbag2_py.Info().read_metadata(str(path), storage_id)
        except _UNREADABLE as error:
            raise _unreadable(error, path) from error
        topics = collect_topics(
            (t.topic_metadata.name, t.topic_metadata.type, t.topic_metadata.serialization_format, t.message_count)
            for t in metadata.topics_with_message_count
        )
        start_ns = metadata.starting_time.nanoseconds
        end_ns = start_ns + metadata.duration.nanoseconds
        return BagInfo(path, storage_id, "", topics, start_ns, end_ns, (StorageFile(path, start_ns),))

    def read(self, bag: BagInfo, file: StorageFile, topics: Collection[str]) -> Generator[tuple[str, int, bytes]]:
        """Yields (topic, receive time in ns, serialized message) of one file in receive order.

        Raises:
            ClpError: The file is damaged or otherwise unreadable.
        """
        with ExitStack() as stack:
            if bag.compression:
                reader = rosbag2_py.SequentialCompressionReader()
                uri = stack.enter_context(tempfile.TemporaryDirectory(prefix="clp_bag_"))
                _write_one_file_bag(bag, file, Path(uri))
            else:
                reader = rosbag2_py.SequentialReader()
                uri = str(file.path)
            try:
                reader.open(rosbag2_py.StorageOptions(uri=uri, storage_id=bag.storage_id), _CDR)
                names = sorted({*topics, *(topic.removeprefix("/") for topic in topics)})
                reader.set_filter(rosbag2_py.StorageFilter(topics=names))
                while reader.has_next():
                    recorded, raw, receive_ns = reader.read_next()
                    topic = absolute_topic(recorded)
                    if topic in topics:  # the filter always lets service events through
                        yield topic, receive_ns, raw
            except _UNREADABLE as error:
                raise _unreadable(error, file.path) from error
            finally:
                del reader  # it has no close() on Jazzy: its file is closed with it

    def decode(self, bag: BagInfo, message_type: str, raw: bytes) -> Any:
        """Deserializes one message of ``bag``, which rosbag2_py has already decompressed.

        Raises:
            CorruptMessageError: ``raw`` is not a message of that type.
            ClpError: The type's package is not in the sourced ROS 2 environment.
        """
        if message_type not in self._classes:
            try:
                self._classes[message_type] = get_message(message_type)
            except (ImportError, AttributeError, ValueError) as error:
                raise ClpError(
                    f"no definition of the message type {message_type} is known",
                    where="the sourced ROS 2 environment",
                    hint="source the workspace that has the type's package, or leave the topic out",
                ) from error
        try:
            return deserialize_message(raw, self._classes[message_type])
        except (RuntimeError, ValueError, MemoryError) as error:
            raise CorruptMessageError(str(error)) from error


def _write_one_file_bag(bag: BagInfo, file: StorageFile, folder: Path) -> None:
    """Makes a bag of one linked file in a temporary folder.

    The compression reader needs metadata.yaml, and writes the decompressed file beside the compressed one.
    """
    link = folder / file.path.name
    link.symlink_to(file.path.absolute())
    information = dict(bag.document["rosbag2_bagfile_information"], relative_file_paths=[str(link)])
    (folder / "metadata.yaml").write_text(
        yaml.safe_dump({"rosbag2_bagfile_information": information}), encoding="utf-8"
    )


def _unreadable(error: Exception, path: Path) -> ClpError:
    return ClpError(
        f"rosbag2 cannot read the file ({error})",
        where=path,
        hint="copy the file again, repair it (mcap recover, ros2 bag reindex), "
        "or read it without ROS (pip install rosbags mcap)",
    )
