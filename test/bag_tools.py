# SPDX-License-Identifier: Apache-2.0
"""Bags for tests: what ``ros2 bag record`` would have written, made with rosbags' writer."""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
INFORMATION = "rosbag2_bagfile_information"

Recorded = Iterable[tuple[str, Any, int]]
"""(topic, message, receive time in ns), in recording order. A message may be ``(type, serialized bytes)``."""

_FOREVER = QosTime(9223372036, 854775807)
_QOS = Qos(
    QosHistory.KEEP_LAST,
    10,
    QosReliability.RELIABLE,
    QosDurability.VOLATILE,
    _FOREVER,
    _FOREVER,
    QosLiveliness.AUTOMATIC,
    _FOREVER,
    False,
)


def header(stamp_ns: int = 0, frame_id: str = "") -> Any:
    stamp = STORE.types["builtin_interfaces/msg/Time"](stamp_ns // 10**9, stamp_ns % 10**9)
    return STORE.types["std_msgs/msg/Header"](stamp, frame_id)


def joint_state(names: Sequence[str], positions: Sequence[float], stamp_ns: int = 0) -> Any:
    """A JointState with positions only."""
    none = np.empty(0)
    return STORE.types["sensor_msgs/msg/JointState"](
        header(stamp_ns), list(names), np.array(positions, float), none, none
    )


def image(rows: np.ndarray, encoding: str, width: int | None = None, stamp_ns: int = 0, is_bigendian: int = 0) -> Any:
    """An Image whose rows' bytes are ``rows``, uint8 (height, step) or (height, width, channels)."""
    height = rows.shape[0]
    width = rows.shape[1] if width is None else width
    data = np.ascontiguousarray(rows).reshape(-1)
    step = data.size // height
    return STORE.types["sensor_msgs/msg/Image"](header(stamp_ns), height, width, encoding, is_bigendian, step, data)


def compressed_image(data: bytes, image_format: str = "jpeg", stamp_ns: int = 0) -> Any:
    return STORE.types["sensor_msgs/msg/CompressedImage"](header(stamp_ns), image_format, np.frombuffer(data, np.uint8))


def string(text: str) -> Any:
    return STORE.types["std_msgs/msg/String"](text)


def write_bag(
    path: Path,
    messages: Recorded,
    storage: Literal["mcap", "sqlite3"] = "mcap",
    compression: Literal["none", "file", "message", "storage"] = "none",
    split: Sequence[int] = (),
    topics: dict[str, str] | None = None,
    store: Typestore = STORE,
) -> Path:
    """Writes a rosbag2 folder.

    Args:
        path: The folder to make.
        messages: What to record.
        storage: Storage plugin.
        compression: zstd by file or message, or ("storage", mcap only) inside the mcap file's chunks.
        split: Message counts at which a new file begins.
        topics: Further topics, name to type, that nothing is recorded on.
        store: The message definitions.

    Returns:
        ``path``.
    """
    messages = messages if not split else list(messages)
    if not split:
        _write_part(path, messages, storage, compression, topics or {}, store)
        _rename_part(path, path, 0)
        return path
    named = {topic: _type_of(message) for topic, message, _ in messages} | (topics or {})
    bounds = [0, *split, len(messages)]
    path.mkdir(parents=True)
    whole: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        for index, (begin, end) in enumerate(pairwise(bounds)):
            part = Path(scratch) / str(index) / path.name
            _write_part(part, messages[begin:end], storage, compression, named, store)
            _rename_part(part, path, index)
            whole = _joined(whole, yaml.safe_load((part / "metadata.yaml").read_text())[INFORMATION])
    (path / "metadata.yaml").write_text(yaml.safe_dump({INFORMATION: whole}))
    return path


def edit_metadata(path: Path, **changes: Any) -> None:
    """Replaces keys of a bag's metadata."""
    document = yaml.safe_load((path / "metadata.yaml").read_text())
    document[INFORMATION].update(changes)
    (path / "metadata.yaml").write_text(yaml.safe_dump(document))


def storage_files(path: Path) -> list[Path]:
    """A bag's storage files, in recording order."""
    return sorted(file for file in path.iterdir() if file.name != "metadata.yaml")


def _type_of(message: Any) -> str:
    return message[0] if isinstance(message, tuple) else message.__msgtype__


def _write_part(
    path: Path, messages: Recorded, storage: str, compression: str, topics: dict[str, str], store: Typestore
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(path, version=9, storage_plugin=StoragePlugin[storage.upper()])
    writer.set_compression(CompressionMode[compression.upper()], CompressionFormat.ZSTD)
    with writer:
        connections = {}

        def connect(topic: str, message_type: str) -> Any:
            if (topic, message_type) not in connections:
                connections[topic, message_type] = writer.add_connection(
                    topic, message_type, typestore=store, offered_qos_profiles=[_QOS]
                )
            return connections[topic, message_type]

        for topic, message_type in topics.items():
            connect(topic, message_type)
        for topic, message, receive_ns in messages:
            connection = connect(topic, _type_of(message))
            raw = message[1] if isinstance(message, tuple) else store.serialize_cdr(message, _type_of(message))
            writer.write(connection, receive_ns, raw)


def _rename_part(part: Path, path: Path, index: int) -> None:
    """Gives the one storage file of ``part`` the name rosbag2 gives it, ``<bag>_<index>``, inside ``path``."""
    (file,) = storage_files(part)
    name = f"{path.name}_{index}{''.join(file.suffixes)}"
    shutil.move(file, path / name)
    document = yaml.safe_load((part / "metadata.yaml").read_text())
    document[INFORMATION]["relative_file_paths"] = [name]
    document[INFORMATION]["files"][0]["path"] = name
    (part / "metadata.yaml").write_text(yaml.safe_dump(document))


def _joined(whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    if whole is None:
        return part
    starts = [entry["starting_time"]["nanoseconds_since_epoch"] for entry in (whole, part)]
    ends = [start + entry["duration"]["nanoseconds"] for start, entry in zip(starts, (whole, part), strict=True)]
    counts = {t["topic_metadata"]["name"]: t["message_count"] for t in part["topics_with_message_count"]}
    for topic in whole["topics_with_message_count"]:
        topic["message_count"] += counts[topic["topic_metadata"]["name"]]
    whole["relative_file_paths"] += part["relative_file_paths"]
    whole["files"] += part["files"]
    whole["message_count"] += part["message_count"]
    whole["starting_time"]["nanoseconds_since_epoch"] = min(starts)
    whole["duration"]["nanoseconds"] = max(ends) - min(starts)
    return whole
