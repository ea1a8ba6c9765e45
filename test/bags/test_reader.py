# SPDX-License-Identifier: Apache-2.0
import dataclasses
import importlib.util
import itertools
import shutil
import sqlite3
import subprocess
import sys
from array import array
from pathlib import Path

import bag_tools
import numpy as np
import pytest
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from clp_ros.bags.reader import open_bag
from clp_ros.bags.rosbags_backend import zstd
from clp_ros.core.errors import ClpError
from clp_ros.messages.stamps import header_stamp_ns

JOINTS = "/follower_left/joint_states"
CAMERA = "/cam_high/image"
BACKENDS = [
    "rosbags",
    pytest.param(
        "rosbag2_py",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("rosbag2_py") is None, reason="rosbag2_py comes with ROS 2 only"
        ),
    ),
]
LAYOUTS = [
    pytest.param({"storage": storage, "compression": compression, "split": split}, id=f"{storage}-{compression}-{name}")
    for storage, compression, (name, split) in itertools.product(
        ["mcap", "sqlite3"], ["none", "file", "message"], [("single", ()), ("split", (20, 45))]
    )
] + [pytest.param({"storage": "mcap", "compression": "storage"}, id="mcap-chunks")]


def demonstration(count: int = 60, step_ns: int = 10_000_000, seed: int = 0) -> list:
    """Joint states, and a small picture at every third; each two share a receive time where they meet."""
    rng = np.random.default_rng(seed)
    messages = []
    for index in range(count):
        now = 1_700_000_000_000_000_000 + index // 3 * 3 * step_ns
        if index % 3 == 2:
            pixels = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            messages.append((CAMERA, bag_tools.image(pixels, "rgb8", stamp_ns=now - 5), now))
        else:
            positions = rng.standard_normal(2)
            messages.append((JOINTS, bag_tools.joint_state(["waist", "elbow"], positions, now - 7 - index), now))
    return messages


def plain(value: object) -> object:
    """A message of either backend as nested lists and dicts."""
    if hasattr(value, "get_fields_and_field_types"):
        return {name: plain(getattr(value, name)) for name in value.get_fields_and_field_types()}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "__msgtype__"}
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | array):
        return value.tolist()
    return [plain(item) for item in value]


def content(messages: object) -> list:
    return [(m.topic, m.type, m.receive_ns, plain(m.data)) for m in messages]


def expected(recorded: list) -> list:
    ordered = sorted(recorded, key=lambda entry: entry[2])  # stable: equal times stay as recorded
    return [(topic, message.__msgtype__, when, plain(message)) for topic, message, when in ordered]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_recorded_messages(write_bag, layout, backend):
    recorded = demonstration()
    path = write_bag(recorded, **layout)
    before = sorted(path.iterdir())
    with open_bag(path, backend) as bag:
        assert bag.backend == backend
        assert {t.name: (t.type, t.count) for t in bag.topics.values()} == {
            JOINTS: ("sensor_msgs/msg/JointState", 40),
            CAMERA: ("sensor_msgs/msg/Image", 20),
        }
        assert (bag.start_ns, bag.end_ns, bag.message_count) == (recorded[0][2], recorded[-1][2], 60)
        assert content(bag.messages()) == expected(recorded)
        # again, and one topic only
        pictures = [entry for entry in expected(recorded) if entry[0] == CAMERA]
        assert content(bag.messages([CAMERA])) == pictures
        assert bag.dropped == {}
    assert sorted(path.iterdir()) == before  # nothing is unpacked into the user's folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_single_file_without_metadata(write_bag, storage, backend):
    recorded = demonstration()
    (file,) = bag_tools.storage_files(path := write_bag(recorded, storage=storage))
    alone = file.rename(path.parent / file.name)
    shutil.rmtree(path)
    with open_bag(alone, backend) as bag:
        assert (bag.start_ns, bag.end_ns, bag.message_count) == (recorded[0][2], recorded[-1][2], 60)
        assert content(bag.messages()) == expected(recorded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_receive_order_across_overlapping_files(write_bag, storage, backend):
    recorded = demonstration()
    shuffled = [recorded[i] for i in np.random.default_rng(1).permutation(60)]
    path = write_bag(shuffled, storage=storage, split=(10, 30, 31))
    with open_bag(path, backend) as bag:
        read = content(bag.messages())
    times = [entry[2] for entry in read]
    assert times == sorted(times)
    assert sorted(map(repr, read)) == sorted(map(repr, expected(recorded)))


def test_split_bag_older_than_per_file_times(write_bag):
    # Until metadata version 4 nothing said when each file begins, and until version 3 paths began with the folder.
    recorded = demonstration()
    path = write_bag(recorded, storage="sqlite3", split=(20, 45))
    names = [f"{path.name}/{file.name}" for file in bag_tools.storage_files(path)]
    bag_tools.edit_metadata(path, version=3, files=[], relative_file_paths=names)
    with open_bag(path, "rosbags") as bag:
        assert content(bag.messages()) == expected(recorded)


def test_sqlite_without_definitions_reads_the_standard_types(write_bag):
    recorded = demonstration()
    (file,) = bag_tools.storage_files(path := write_bag(recorded, storage="sqlite3"))
    with sqlite3.connect(file) as database:  # as ROS 2 Humble wrote it
        database.executescript("DROP TABLE schema; DROP TABLE metadata; DROP TABLE message_definitions;")
    with open_bag(path, "rosbags") as bag:
        assert content(bag.messages()) == expected(recorded)


def test_type_without_definition(write_bag):
    messages = [("/waist", ("acme_msgs/msg/Torque", b"\x00\x01\x00\x00" + bytes(8)), 5), *demonstration(6)]
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("float64 value", "acme_msgs/msg/Torque"))
    carried, bare = (write_bag(messages, storage="sqlite3", store=store) for _ in range(2))
    with open_bag(carried, "rosbags") as bag:
        assert next(bag.messages(["/waist"])).data.value == 0.0
    with sqlite3.connect(bag_tools.storage_files(bare)[0]) as database:
        database.execute("DELETE FROM message_definitions")
    with open_bag(bare, "rosbags") as bag:
        assert len(list(bag.messages([JOINTS, CAMERA]))) == 6  # the others can be read
        with pytest.raises(ClpError, match="acme_msgs/msg/Torque: neither the bag nor ROS 2 Jazzy defines"):
            list(bag.messages())


def test_missing_path(tmp_path):
    with pytest.raises(ClpError, match=r"nowhere: the bag does not exist"):
        open_bag(tmp_path / "nowhere")


def test_not_a_bag(tmp_path):
    with pytest.raises(ClpError, match=r"has no metadata\.yaml"):
        open_bag(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ClpError, match="not a rosbag2 recording"):
        open_bag(tmp_path / "notes.txt")
    for suffix, kind in ((".mcap", "mcap"), (".db3", "sqlite3")):
        (tmp_path / f"x{suffix}").write_bytes(b"x" * 500)
        with pytest.raises(ClpError, match=f"the file is not {kind}"):
            open_bag(tmp_path / f"x{suffix}")
        (tmp_path / f"x{suffix}").write_bytes(b"")
        with pytest.raises(ClpError, match="truncated"):
            open_bag(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(
    "text", ["", "[]", "a: [", "rosbag2_bagfile_information: {version: 9}", "\x00", "a: 2024-99-99", "[" * 5000]
)
def test_metadata_that_is_not_metadata(tmp_path, text):
    (tmp_path / "metadata.yaml").write_text(text)
    with pytest.raises(ClpError, match=r"metadata\.yaml: .*metadata cannot be read"):
        open_bag(tmp_path)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_empty_bag(write_bag, storage):
    path = write_bag([], storage=storage, topics={JOINTS: "sensor_msgs/msg/JointState"})
    with pytest.raises(ClpError, match="the bag has no messages"):
        open_bag(path)
    with pytest.raises(ClpError, match="the bag has no messages"):
        open_bag(bag_tools.storage_files(path)[0])


def test_unknown_storage_compression_and_serialization(write_bag):
    path = write_bag(demonstration(6))
    bag_tools.edit_metadata(path, storage_identifier="cloud")
    with pytest.raises(ClpError, match="unknown storage id 'cloud'"):
        open_bag(path)
    bag_tools.edit_metadata(path, storage_identifier="mcap", compression_mode="FILE", compression_format="lz4")
    with pytest.raises(ClpError, match=r"unknown compression.*lz4"):
        open_bag(path)
    path = write_bag(demonstration(6))
    text = (path / "metadata.yaml").read_text()
    (path / "metadata.yaml").write_text(text.replace("serialization_format: cdr", "serialization_format: protobuf"))
    with open_bag(path) as bag, pytest.raises(ClpError, match=r"serialized as 'protobuf', not cdr"):
        bag.messages([JOINTS])


def test_topic_of_two_types(write_bag):
    messages = [*demonstration(3), (JOINTS, bag_tools.string("not a joint state"), 1_800_000_000_000_000_000)]
    with open_bag(write_bag(messages)) as bag:
        with pytest.raises(ClpError, match=f"topic {JOINTS} was recorded with two types"):
            bag.messages([JOINTS])
        assert len(list(bag.messages([CAMERA]))) == 1  # no one else's affair


def test_unknown_backend(write_bag):
    with pytest.raises(ClpError, match="unknown backend 'rosbag3'"):
        open_bag(write_bag(demonstration(6)), "rosbag3")


def test_missing_topic_names_its_neighbours(write_bag):
    bag = open_bag(write_bag(demonstration(6)))
    with pytest.raises(ClpError, match=f"/follower_left/joint_state is not in the bag.*did you mean '{JOINTS}'"):
        bag.messages(["/follower_left/joint_state"])  # at once, not at the first message
    with pytest.raises(ClpError, match=r"/zzz is not in the bag.*known: "):
        bag.messages([JOINTS, "/zzz"])


def test_missing_split_file(write_bag):
    path = write_bag(demonstration(), split=(20, 45))
    bag_tools.storage_files(path)[1].unlink()
    with pytest.raises(ClpError, match=r"_1\.mcap: the file is named in metadata\.yaml and missing"):
        open_bag(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"storage": s, "compression": c}, id=f"{s}-{c}")
        for s, c in itertools.product(["mcap", "sqlite3"], ["none", "file", "message"])
    ],
)
def test_truncated_file_is_an_error(write_bag, layout, fraction, backend):
    path = write_bag(demonstration(), split=(30,), **layout)
    for index, file in enumerate(bag_tools.storage_files(path)):
        data = file.read_bytes()
        file.write_bytes(data[: min(int(len(data) * fraction), len(data) - 1)])
        with pytest.raises(ClpError, match=r"bag_\d+.*: truncated") as caught, open_bag(path, backend) as bag:
            list(bag.messages())
        assert file.name in str(caught.value) or layout["compression"] == "file", index
        if layout["compression"] != "file":
            with pytest.raises(ClpError, match="truncated"):
                open_bag(file, backend)
        file.write_bytes(data)
    assert len(list(open_bag(path, backend).messages())) == 60


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_whole_file_with_fewer_messages_than_promised(write_bag, storage, backend):
    # A whole file of a shorter recording in the place of the one the metadata describes.
    path, shorter = (write_bag(demonstration(count), storage=storage) for count in (60, 30))
    shutil.copy(bag_tools.storage_files(shorter)[0], bag_tools.storage_files(path)[0])
    with (
        open_bag(path, backend) as bag,
        pytest.raises(ClpError, match="truncated bag: only 10 of 20 messages of /cam_high"),
    ):
        list(bag.messages())


@pytest.mark.parametrize("content", ["cut off", "another format", "no recording"])
def test_a_fault_within_a_compressed_file_names_that_file(write_bag, tmp_path, content):
    path = write_bag(demonstration(), storage="sqlite3", compression="file")
    (file,) = bag_tools.storage_files(path)
    plain = zstd.decompress(file.read_bytes())
    if content == "no recording":
        sqlite3.connect(other := tmp_path / "other.db3").execute("CREATE TABLE t (x)").connection.close()
        plain = other.read_bytes()
    elif content == "cut off":
        plain = plain[: len(plain) // 2]
    else:
        plain = b"\x89MCAP0\r\n" * 99
    file.write_bytes(zstd.compress(plain))
    with pytest.raises(ClpError) as fault:
        list(open_bag(path, "rosbags").messages())
    assert fault.value.where == str(file)


def test_a_database_in_a_folder_whose_name_means_something_in_a_uri(write_bag):
    path = write_bag(recorded := demonstration(), storage="sqlite3")
    hard = path.rename(path.with_name("run #3, 90%41? of it"))
    with open_bag(hard, "rosbags") as bag:
        assert content(bag.messages()) == expected(recorded)


def test_open_sqlite_recording(write_bag):
    (file,) = bag_tools.storage_files(path := write_bag(demonstration(), storage="sqlite3"))
    file.with_name(file.name + "-wal").write_bytes(b"log")
    with pytest.raises(ClpError, match=r"-wal: .*not closed"):
        open_bag(path)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_damaged_bytes_never_escape_as_another_error(write_bag, storage):
    (file,) = bag_tools.storage_files(path := write_bag(demonstration(), storage=storage))
    data = file.read_bytes()
    rng = np.random.default_rng(3)
    outcomes = set()
    for _ in range(150):
        damaged = np.frombuffer(data, np.uint8).copy()
        at = rng.integers(0, damaged.size)
        damaged[at : at + rng.integers(1, 200)] = rng.integers(0, 256)
        file.write_bytes(damaged.tobytes())
        try:
            with open_bag(path, "rosbags") as bag:
                read = len(list(bag.messages()))
                assert read + sum(bag.dropped.values()) == 60
                outcomes.add("read")
        except ClpError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compression", ["none", "message"])
def test_corrupt_message_is_dropped_and_counted(write_bag, backend, compression):
    recorded = demonstration()
    damaged = list(recorded)
    for index in (3, 30):  # joint states, cut off in their arrays
        topic, message, when = recorded[index]
        raw = bytes(bag_tools.STORE.serialize_cdr(message, message.__msgtype__))
        damaged[index] = (topic, (message.__msgtype__, raw[: len(raw) // 2]), when)
    with open_bag(write_bag(damaged, compression=compression), backend) as bag:
        good = [entry for index, entry in enumerate(expected(recorded)) if index not in (3, 30)]
        for _ in range(2):  # counted anew in each run
            assert content(bag.messages()) == good
            assert bag.dropped == {JOINTS: 2}
        list(bag.messages([CAMERA]))
        assert bag.dropped == {}


def test_random_damage_in_messages_is_a_drop_or_another_message(write_bag):
    rng = np.random.default_rng(4)
    damaged = []
    for topic, message, when in demonstration(12) * 100:
        raw = np.frombuffer(bag_tools.STORE.serialize_cdr(message, message.__msgtype__), np.uint8)
        raw = raw[: rng.integers(0, raw.size + 1)].copy()
        raw[rng.integers(0, raw.size + 1) :][:4] = rng.integers(0, 256)
        damaged.append((topic, (message.__msgtype__, raw.tobytes()), when))
    with open_bag(write_bag(damaged), "rosbags") as bag:
        read = sum(1 for _ in bag.messages())
        assert read + sum(bag.dropped.values()) == 1200
        assert sum(bag.dropped.values()) > 1000


def test_fingerprint(write_bag, tmp_path):
    recorded = demonstration()
    path = write_bag(recorded, split=(20, 45))
    original = open_bag(path).fingerprint()
    moved = path.rename(tmp_path / "elsewhere")
    assert open_bag(moved).fingerprint() == original
    file = bag_tools.storage_files(moved)[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert open_bag(moved).fingerprint() != original
    assert open_bag(write_bag(demonstration(seed=1), split=(20, 45))).fingerprint() != original


READ_WITH_MEMORY = """
import resource, sys
from clp_ros.bags.reader import open_bag
from clp_ros.bags.rosbags_backend import zstd
with open_bag(sys.argv[1], "rosbags") as bag:
    peaks = []
    for message in bag.messages():
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(len(peaks), peaks[9], peaks[-1])
"""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"storage": "mcap"}, id="mcap"),
        pytest.param({"storage": "sqlite3"}, id="sqlite3"),
        pytest.param({"storage": "mcap", "compression": "file", "split": (80, 160)}, id="mcap-file"),
    ],
)
def test_memory_does_not_grow_with_the_bag(write_bag, layout):
    rng = np.random.default_rng(0)
    pictures = (np.frombuffer(rng.bytes(480 * 640 * 3), np.uint8).reshape(480, 640, 3) for _ in range(240))
    path = write_bag(((CAMERA, bag_tools.image(p, "rgb8"), i * 1000 + 1) for i, p in enumerate(pictures)), **layout)
    try:
        assert sum(file.stat().st_size for file in path.iterdir()) > 200 << 20
        done = subprocess.run(
            [sys.executable, "-c", READ_WITH_MEMORY, str(path)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        shutil.rmtree(path)
    count, early, late = map(int, done.stdout.split())
    assert count == 240
    assert late - early < 32  # MiB


def test_real_recordings(shared_data):
    with open_bag(shared_data / "bags" / "wx200_joint_states", "rosbags") as bag:
        messages = list(bag.messages(["/wx200/joint_states"]))
        assert len(messages) == 10598
        assert messages[0].data.name[0] == "waist"
        assert all(a.receive_ns <= b.receive_ns for a, b in itertools.pairwise(messages))
        # types that only the bag itself defines
        assert next(bag.messages(["/wx200/commands/joint_single"])).type == "interbotix_xs_sdk/msg/JointSingleCommand"
        assert sum(1 for _ in bag.messages()) == bag.message_count == 11621


def test_header_stamp():
    assert header_stamp_ns(bag_tools.joint_state([], [], 1_700_000_000_123_456_789)) == 1_700_000_000_123_456_789
    assert header_stamp_ns(bag_tools.string("no header")) is None
