# SPDX-License-Identifier: Apache-2.0
"""Writes rosbag2 recordings of simulated demonstrations without ROS, in the layout of ``ros2 bag record``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
"""Message classes by name, as in ``STORE.types["sensor_msgs/msg/JointState"]``."""

_NO_DEADLINE = QosTime(0, 0)


def header(stamp_ns: int, frame_id: str = "") -> Any:
    """A ``std_msgs/Header``."""
    time = STORE.types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, 10**9))
    return STORE.types["std_msgs/msg/Header"](time, frame_id)


def write_bag(
    folder: Path,
    name: str,
    topics: Mapping[str, str],
    messages: Iterable[tuple[int, str, Any]],
    notes: Mapping[str, str],
) -> None:
    """Writes a recording into an empty folder. Equal messages give equal bytes.

    Args:
        folder: An empty folder, for ``metadata.yaml`` and the mcap file.
        name: Name of the mcap file without suffix. The folder may have another, temporary name.
        topics: Message types, by topic.
        messages: (receive time in ns, topic, message of :data:`STORE`), in the order of their receive times.
        notes: The bag's custom data.
    """
    inner = folder / name  # the writer creates this folder and names the file after it
    with Writer(inner, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP) as writer:
        for key, value in notes.items():
            writer.set_custom_data(key, value)
        connections = {
            topic: writer.add_connection(topic, kind, typestore=STORE, offered_qos_profiles=[_offered(kind)])
            for topic, kind in topics.items()
        }
        for receive_ns, topic, message in messages:
            writer.write(connections[topic], receive_ns, STORE.serialize_cdr(message, topics[topic]))
    for file in inner.iterdir():
        file.rename(folder / file.name)
    inner.rmdir()


def _offered(kind: str) -> Qos:
    """The QoS that drivers offer: best effort for images, reliable for joint states."""
    sensor_data = kind in ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=5 if sensor_data else 10,
        reliability=QosReliability.BEST_EFFORT if sensor_data else QosReliability.RELIABLE,
        durability=QosDurability.VOLATILE,
        deadline=_NO_DEADLINE,
        lifespan=_NO_DEADLINE,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_NO_DEADLINE,
        avoid_ros_namespace_conventions=False,
    )
