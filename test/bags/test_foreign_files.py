# SPDX-License-Identifier: Apache-2.0
"""Recordings that other programs wrote, whole or not: read, or refused for what is really wrong."""

import itertools
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import bag_tools
import numpy as np
import pytest
from mcap.writer import CompressionType, IndexType, Writer

from clp_ros.bags.reader import BagReader, open_bag
from clp_ros.core.errors import ClpError

STATES, EYE = "sensor_msgs/msg/JointState", "sensor_msgs/msg/Image"
START = 1_700_000_000_000_000_000
STEP = 10_000_000


def definition(kind: str) -> bytes:
    return bag_tools.STORE.generate_msgdef(kind, ros_version=2)[0].encode()


def message(topic: str, step: int) -> Any:
    if topic == "/states":
        return bag_tools.joint_state(["waist"], [step / 8], START + step * STEP)
    return bag_tools.image(np.full((4, 6, 3), step % 256, np.uint8), "rgb8", stamp_ns=START + step * STEP)


def write_mcap(
    path: Path,
    steps: int = 60,
    topics: tuple[str, str] = ("/states", "/eye"),
    types: tuple[str, str] = (STATES, EYE),
    definitions: tuple[bytes, bytes] | None = None,
    profile: str = "ros2",
    extras: tuple[tuple[str, str, str, bytes, str, bytes], ...] = (),
    order: list[int] | None = None,
    encoding: str = "cdr",
    **options: Any,
) -> Path:
    """60 states and 60 pictures; ``extras`` are (topic, type, schema encoding, schema, message encoding, message)."""
    with path.open("wb") as stream:
        writer = Writer(stream, **{"chunk_size": 2000, "compression": CompressionType.NONE} | options)
        writer.start(profile=profile, library="a test")
        channels = []
        for topic, kind, schema in zip(
            topics, types, definitions or (definition(STATES), definition(EYE)), strict=True
        ):
            number = writer.register_schema(kind, "ros2msg", schema)
            channels.append(writer.register_channel(topic, encoding, number))
        for topic, kind, schema_encoding, schema, message_encoding, raw in extras:
            number = writer.register_schema(kind, schema_encoding, schema) if schema_encoding != "-" else 0
            channel = writer.register_channel(topic, message_encoding, number)
            writer.add_message(channel, START, raw, START)
        for step in order or range(steps):
            for channel, topic, kind in zip(channels, ("/states", "/eye"), (STATES, EYE), strict=True):
                raw = bytes(bag_tools.STORE.serialize_cdr(message(topic, step), kind))
                writer.add_message(channel, START + step * STEP, raw, START + step * STEP)
        writer.finish()
    return path


def check(bag: BagReader, steps: int = 60) -> None:
    """The bag's two topics hold what was written."""
    assert {name: (bag.topics[name].type, bag.topics[name].count) for name in ("/states", "/eye")} == {
        "/states": (STATES, steps),
        "/eye": (EYE, steps),
    }
    found = list(bag.messages(["/states", "/eye"]))
    assert [(m.topic, m.receive_ns) for m in found] == [
        (topic, START + step * STEP) for step in range(steps) for topic in ("/states", "/eye")
    ]
    for step, (states, eye) in enumerate(itertools.batched(found, 2)):
        assert states.data.position[0] == step / 8
        assert eye.data.data[0] == step
    assert len(list(bag.messages(["eye"]))) == steps  # a caller may leave the slash out too


NO_INDEX = {"index_types": IndexType.NONE}
LAYOUTS = {
    "plain": {},
    "zstd": {"compression": CompressionType.ZSTD},
    "lz4": {"compression": CompressionType.LZ4},
    "one chunk": {"chunk_size": 1 << 30},
    "no chunks": {"use_chunking": False},
    "no index of messages": {"index_types": IndexType.ALL & ~IndexType.MESSAGE},  # rosbag2's preset fastwrite
    "no index of messages, no statistics": {"index_types": IndexType.CHUNK, "use_statistics": False},
    "no index of chunks": NO_INDEX,
    "no statistics": {"use_statistics": False},
    "no repeated channels": {"repeat_channels": False, "repeat_schemas": False},
    "no summary": NO_INDEX
    | {"repeat_channels": False, "repeat_schemas": False, "use_statistics": False, "use_summary_offsets": False},
    "no summary, no chunks": NO_INDEX
    | {
        "repeat_channels": False,
        "repeat_schemas": False,
        "use_statistics": False,
        "use_summary_offsets": False,
        "use_chunking": False,
    },
    "no checksums": {"enable_crcs": False},
    "profile ''": {"profile": ""},
    "topics without a slash": {"topics": ("states", "eye")},
    "types in two parts": {"types": ("sensor_msgs/JointState", "sensor_msgs/Image")},
    "no definitions": {"definitions": (b"", b"")},
    "no definitions of what is inside": {
        "definitions": tuple(definition(k).split(b"=" * 80)[0] for k in (STATES, EYE))
    },
    "definitions that cannot be understood": {"definitions": (b"\xff ?", b"{")},
}


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "shuffled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_mcap(tmp_path, layout, ordered):
    order = list(range(60)) if ordered else np.random.default_rng(1).permutation(60).tolist()
    with open_bag(write_mcap(tmp_path / "a.mcap", order=order, **layout), "rosbags") as bag:
        check(bag)
        assert (bag.start_ns, bag.end_ns, bag.message_count) == (START, START + 59 * STEP, 120)


def cdr(text: str) -> bytes:
    return bytes(bag_tools.STORE.serialize_cdr(bag_tools.string(text), "std_msgs/msg/String"))


STRING = ("std_msgs/msg/String", "ros2msg", b"string data", "cdr", cdr("x"))
FOREIGN = {
    "json": [("/events", "event", "jsonschema", b'{"type": "object"}', "json", b"{}")],
    "protobuf": [("/events", "acme.Event", "protobuf", b"\x0a\xff\x00\xfe", "protobuf", b"\x08\x01")],
    "no schema": [("/events", "", "-", b"", "json", b"{}")],
    "unknown": [("/events", "acme_msgs/msg/Event", "unknown", b"", "cdr", b"\0\1\0\0")],
    "undefined": [("/events", "acme_msgs/msg/Event", "ros2msg", b"acme_msgs/Inner inner", "cdr", b"\0\1\0\0")],
    "nonsense": [("/events", "acme_msgs/msg/Event", "ros2msg", b"\xff\xfe ??? {", "cdr", b"\0\1\0\0")],
    "flatbuffer": [("/events", "Event", "flatbuffer", b"\x18\0\0\0BFBS", "flatbuffer", b"\0\0")],
    "two types": [
        ("/events", *STRING),
        ("/events", "std_msgs/msg/Int32", "ros2msg", b"int32 data", "cdr", b"\0\1\0\0\0\0\0\0"),
    ],
    "a topic of no ROS name": [("Störung: 1 #2", *STRING)],
}
FOREIGN_WORDS = {
    "json": r"topic /events is serialized as 'json', not cdr",
    "protobuf": r"topic /events is serialized as 'protobuf', not cdr",
    "no schema": r"topic /events was recorded without its type",
    "unknown": r"acme_msgs/msg/Event: neither the bag nor ROS 2 Jazzy defines this message type",
    "undefined": r": the bag's definition of acme_msgs/msg/Event cannot be used .*acme_msgs/msg/Inner",
    "nonsense": r": the bag's definition of acme_msgs/msg/Event cannot be used",
    "flatbuffer": r"topic /events is serialized as 'flatbuffer', not cdr",
    "two types": r"topic /events was recorded with two types, std_msgs/msg/String and std_msgs/msg/Int32",
}


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("name", FOREIGN)
def test_other_topics_do_not_matter(tmp_path, name, chunked):
    path = write_mcap(tmp_path / "a.mcap", extras=tuple(FOREIGN[name]), use_chunking=chunked)
    with open_bag(path, "rosbags") as bag:
        check(bag)
        if name in FOREIGN_WORDS:
            with pytest.raises(ClpError, match=FOREIGN_WORDS[name]):
                list(bag.messages(["/events"]))
        else:
            assert len(list(bag.messages())) == 121


@pytest.mark.parametrize("layout", ["plain", "no chunks", "no summary"])
def test_text_that_is_not_utf_8(tmp_path, layout):
    extras = (("/caf__", "caf__.Event", "jsonschema", b"{}", "json", b"{}"),)
    path = write_mcap(tmp_path / "a.mcap", extras=extras, enable_crcs=False, **LAYOUTS[layout])
    path.write_bytes(path.read_bytes().replace(b"caf__", b"caf\xe9\xe9"))
    with open_bag(path, "rosbags") as bag:
        check(bag)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("alone", [False, True])
def test_other_topics_of_a_folder_do_not_matter(write_bag, storage, alone):
    messages = [
        (topic, message(topic, step), START + step * STEP) for step in range(60) for topic in ("/states", "/eye")
    ]
    odd = [("/events", bag_tools.string("x"), START), ("/events", message("/states", 0), START)]
    path = write_bag([*odd, *messages], storage=storage)
    document = (path / "metadata.yaml").read_text()
    (path / "metadata.yaml").write_text(document.replace("name: /events", "name: events", 1))
    if storage == "sqlite3":
        with sqlite3.connect(bag_tools.storage_files(path)[0]) as database:
            database.execute("INSERT INTO topics VALUES (77, '/json', 'event', 'json', '', '')")
            database.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (77, ?, ?)", (START, "{}"))
            database.execute("UPDATE topics SET offered_qos_profiles = 'history: [' WHERE name = '/events'")
            # rosbag2's own word where it finds no definition
            database.execute("UPDATE message_definitions SET encoding = 'unknown', encoded_message_definition = ''")
    with open_bag(bag_tools.storage_files(path)[0] if alone else path, "rosbags") as bag:
        check(bag)
        with pytest.raises(ClpError, match="topic /events was recorded with two types"):
            bag.messages(["/events"])


def test_two_types_of_which_one_was_never_sent(tmp_path):
    path = write_mcap(tmp_path / "a.mcap")
    with path.open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="ros2", library="a test")
        for kind, count in (("std_msgs/msg/Int32", 0), ("std_msgs/msg/String", 3), ("std_msgs/msg/Int8", 0)):
            channel = writer.register_channel("/word", "cdr", writer.register_schema(kind, "ros2msg", definition(kind)))
            for step in range(count):
                writer.add_message(channel, START + step, cdr("word"), START + step)
        writer.finish()
    with open_bag(path, "rosbags") as bag:
        assert [m.data.data for m in bag.messages(["/word"])] == ["word"] * 3


def test_ros_1_in_mcap_is_named(tmp_path):
    bag = open_bag(write_mcap(tmp_path / "a.mcap", profile="ros1", encoding="ros1"), "rosbags")
    with pytest.raises(ClpError, match=r"topic /eye has messages of ROS 1 .*rosbags-convert.* the original .bag"):
        bag.messages(["/eye"])


def records(data: bytes) -> list[tuple[int, bytes]]:
    """(kind, whole record) of a file's top level."""
    found, at = [], 8
    while at < len(data) - 8:
        kind, length = struct.unpack_from("<BQ", data, at)
        found.append((kind, data[at : at + 9 + length]))
        at += 9 + length
    return found


@pytest.mark.parametrize("place", ["before", "after"])
def test_messages_beside_chunks_are_read(tmp_path, place):
    # The format allows it, and no index tells of them. Kinds: 5 message, 6 chunk, 0x0f end of the data.
    loose = records(write_mcap(tmp_path / "a.mcap", use_chunking=False).read_bytes())
    file = write_mcap(tmp_path / "b.mcap", enable_crcs=False)
    before = next(raw for kind, raw in loose if kind == 0x05)
    declared = [raw for kind, raw in loose[:10] if kind in (0x03, 0x04)]
    parts = records(file.read_bytes())
    at = next(i for i, (kind, _) in enumerate(parts) if kind == (0x06 if place == "before" else 0x0F))
    mixed = [raw for _, raw in parts[:at]] + declared + [before] + [raw for _, raw in parts[at:-1]]
    # A message after the chunks changes no chunk's place, and the summary goes on to look complete.
    (summary,) = struct.unpack_from("<Q", parts[-1][1], 9)
    summary = summary + sum(map(len, [*declared, before])) if place == "after" else 0
    footer = b"\x02" + struct.pack("<QQQI", 20, summary, 0, 0)
    magic = file.read_bytes()[:8]
    file.write_bytes(magic + b"".join(raw for raw in mixed) + footer + magic)
    with open_bag(file, "rosbags") as bag:
        assert len(list(bag.messages())) == bag.message_count == 121


def test_a_summary_that_leaves_something_out_is_not_believed(tmp_path):
    path = write_mcap(tmp_path / "a.mcap", enable_crcs=False)
    data = path.read_bytes()
    # The number of chunk indexes differs from the statistics: one becomes a record that nobody knows.
    at = data.rindex(b"\x08", 0, len(data) - 200)
    while struct.unpack_from("<Q", data, at + 1)[0] > 200:
        at = data.rindex(b"\x08", 0, at)
    path.write_bytes(data[:at] + b"\x7f" + data[at + 1 :])
    with open_bag(path, "rosbags") as bag:
        check(bag)


@pytest.mark.parametrize("compression", ["file", "message"])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_one_file_of_a_compressed_bag(write_bag, storage, compression):
    messages = [
        (topic, message(topic, step), START + step * STEP) for step in range(60) for topic in ("/states", "/eye")
    ]
    path = write_bag(messages, storage=storage, compression=compression)
    check(open_bag(path, "rosbags"))
    (file,) = bag_tools.storage_files(path)
    renamed = shutil.copy(file, path.parent / f"renamed{'.mcap' if storage == 'mcap' else '.db3'}")
    for alone in (file, renamed):
        with pytest.raises(ClpError, match=r"the file belongs to a compressed bag .*give the folder"):
            list(open_bag(alone, "rosbags").messages())
    if compression == "message":
        bag_tools.edit_metadata(path, compression_mode="", compression_format="")
        with pytest.raises(ClpError, match=r"compressed one by one, but metadata\.yaml does not say so"):
            list(open_bag(path, "rosbags").messages())


KILLED = """
import os, signal, sqlite3, sys
sys.path[:0] = sys.argv[2:]
import bag_tools
storage, path = sys.argv[1].split(":")
if storage == "mcap":
    from mcap.writer import Writer
    stream = open(path, "wb")
    writer = Writer(stream, chunk_size=2000)
    writer.start(profile="ros2", library="a test")
    schema = writer.register_schema("std_msgs/msg/String", "ros2msg", b"string data")
    channel = writer.register_channel("/s", "cdr", schema)
    for step in range(1000):
        writer.add_message(channel, step, b"\\0\\1\\0\\0\\1\\0\\0\\0\\0", step)
    stream.flush()
else:
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT)")
    database.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)")
    database.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_recorder_that_was_killed(tmp_path, storage):
    file = tmp_path / f"bag_0{'.mcap' if storage == 'mcap' else '.db3'}"
    subprocess.run([sys.executable, "-c", KILLED, f"{storage}:{file}", str(Path(__file__).parents[1])], check=False)
    words = (
        "the mcap file has no end .*its recorder was killed" if storage == "mcap" else "the recording was not closed"
    )
    with pytest.raises(ClpError, match=words):
        open_bag(file)
    with pytest.raises(ClpError, match=rf"metadata\.yaml is missing beside {file.name}: the recorder was killed"):
        open_bag(tmp_path)


def test_what_is_no_bag_is_named(tmp_path):
    for name, content, words in (
        ("a.bag", b"#ROSBAG V2.0\n", "the bag is one of ROS 1.*rosbags-convert"),
        ("a.mcap", b"#ROSBAG V2.0\n" + bytes(100), "the file is not mcap but a ROS 1 bag"),
        (
            "a.mcap",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "but a Git LFS pointer.*git lfs pull",
        ),
        ("a.db3", b"\x89MCAP0\r\n" + bytes(100), "the file is not sqlite3 but an mcap file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ClpError, match=words):
            open_bag(tmp_path / name)
    for name in ("one", "two"):
        (tmp_path / "parent" / name).mkdir(parents=True)
        (tmp_path / "parent" / name / "metadata.yaml").touch()
    with pytest.raises(ClpError, match=r"not a rosbag2 recording.*: give the recordings in it: one, two"):
        open_bag(tmp_path / "parent")
    database = sqlite3.connect(tmp_path / "other.db3")
    database.execute("CREATE TABLE people (name TEXT)")
    database.commit()
    database.close()
    with pytest.raises(ClpError, match="not a rosbag2 recording: it has no table of messages"):
        open_bag(tmp_path / "other.db3", "rosbags")


@pytest.mark.parametrize("layout", ["plain", "no chunks", "zstd", "no summary"])
def test_damage_is_still_damage(tmp_path, layout):
    whole = write_mcap(tmp_path / "a.mcap", **LAYOUTS[layout]).read_bytes()
    rng = np.random.default_rng(3)
    outcomes = set()
    for number in range(100):
        data = np.frombuffer(whole, np.uint8).copy()
        at = rng.integers(8, data.size - 8)
        data[at : at + rng.integers(1, 60)] = rng.integers(0, 256)
        data[-8:] = np.frombuffer(whole[-8:], np.uint8)
        path = tmp_path / f"{number}.mcap"
        path.write_bytes(data.tobytes())
        try:
            with open_bag(path, "rosbags") as bag:
                outcomes.add(len(list(bag.messages())) + sum(bag.dropped.values()) > 0)
        except ClpError:
            outcomes.add("refused")
    assert "refused" in outcomes
