# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint folders: right about sound ones, and a ClpError with the reason for every damaged one."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import (
    DAMAGES,
    EMBED,
    LAYERS,
    edit_json,
    join_file,
    layer_key,
    split_file,
    synthetic_tensors,
    weights,
    write_synthetic,
    write_weights,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clp_ros.checkpoints.safetensors_header import DTYPE_BITS, encode_header, read_header
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_synthetic(tmp_path / "checkpoint")


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found_with_its_bytes(tmp_path: Path, shards: int):
    checkpoint = Checkpoint.open(write_synthetic(tmp_path / "checkpoint", shards=shards))
    expected = synthetic_tensors()
    assert checkpoint.tensors.keys() == expected.keys()
    assert len(checkpoint.weight_files) == shards
    for name, tensor in checkpoint.tensors.items():
        with (checkpoint.path / tensor.file).open("rb") as file:
            file.seek(tensor.start)
            assert file.read(tensor.nbytes) == expected[name].tobytes()
        assert (tensor.shape, tensor.elements) == (expected[name].shape, expected[name].size)
    assert checkpoint.parameters() == sum(array.size for array in expected.values())
    assert checkpoint.layers == {"vlm": LAYERS, "expert": LAYERS}
    assert checkpoint.module_parameters() == {
        module: sum(array.size for name, array in expected.items() if name.startswith(layer_key(module, 0, "")[:-2]))
        for module in ("vlm", "expert")
    }
    assert checkpoint.nbytes == sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())
    assert {"README.md", "vlm/tokenizer.json"} < checkpoint.files.keys()
    assert checkpoint.family.name == "smolvla"
    assert checkpoint.manifest is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_reason(folder: Path, damage: str):
    inflict, reason = DAMAGES[damage]
    inflict(folder)
    with pytest.raises(ClpError) as caught:
        Checkpoint.open(folder)
    assert reason in str(caught.value)
    assert str(folder) in str(caught.value) or caught.value.where == "config.json"


def test_a_hub_snapshot_of_links_reads_as_the_files_do(folder: Path, tmp_path: Path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    plain = Checkpoint.open(folder)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            path.rename(blobs / str(number))
            path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    linked = Checkpoint.open(folder)
    assert linked == plain
    assert linked.fingerprint() == plain.fingerprint()


def test_version_control_and_download_records_are_no_part_of_it(folder: Path):
    before = Checkpoint.open(folder)
    for name in (".git/lfs/objects/old.bin", ".cache/huggingface/download/model.metadata"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
    assert Checkpoint.open(folder) == before


def test_the_fingerprint_stays_when_the_folder_moves_or_is_sharded(folder: Path, tmp_path: Path):
    fingerprint = Checkpoint.open(folder).fingerprint()
    moved = write_synthetic(tmp_path / "elsewhere" / "copy", shards=2)
    assert json.loads((moved / "config.json").read_text()) != json.loads((folder / "config.json").read_text())
    assert Checkpoint.open(moved).fingerprint() == fingerprint


def test_the_fingerprint_shows_training_and_settings(folder: Path, tmp_path: Path):
    seen = {Checkpoint.open(folder).fingerprint()}
    for name, array in synthetic_tensors().items():
        if not array.size:
            continue
        tensors = synthetic_tensors()
        tensors[name][...] += 1
        write_weights(folder, tensors)
        seen.add(Checkpoint.open(folder).fingerprint())
    write_weights(folder, synthetic_tensors())
    edit_json("config.json", lambda config: config.update(optimizer_lr=2e-4))(folder)
    seen.add(Checkpoint.open(folder).fingerprint())
    assert len(seen) == 1 + len([array for array in synthetic_tensors().values() if array.size]) + 1


@pytest.mark.parametrize("change", ["replaced", "written", "gone"])
def test_weights_are_read_from_the_files_whose_headers_were_read(folder: Path, change: str):
    opened, weights = Checkpoint.open(folder), folder / "model.safetensors"
    opened.check_unchanged("model.safetensors")
    if change == "replaced":  # by a training run: the same names, shapes and size
        (folder / "new").write_bytes(weights.read_bytes())
        (folder / "new").replace(weights)
    elif change == "written":
        with weights.open("r+b") as file:
            file.write(weights.read_bytes())
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    else:
        weights.unlink()
    for read in (lambda: opened.check_unchanged("model.safetensors"), opened.fingerprint):
        with pytest.raises(ClpError, match=r"model\.safetensors") as refused:
            read()
        assert "changed while" in str(refused.value) or "cannot be read any more" in str(refused.value)


def test_the_fingerprint_samples_the_whole_of_a_large_tensor(folder: Path):
    tensors = synthetic_tensors() | {EMBED: np.zeros((1000, 1000), np.float16)}
    write_weights(folder, tensors)
    checkpoint = Checkpoint.open(folder)
    start, end = checkpoint.tensors[EMBED].start, checkpoint.tensors[EMBED].end
    seen = {checkpoint.fingerprint()}
    for position in (start, (2 * start + end) // 3, (start + 2 * end) // 3, end - 1):
        with weights(folder).open("r+b") as file:
            file.seek(position)
            file.write(b"\x01")
        seen.add(Checkpoint.open(folder).fingerprint())
    assert len(seen) == 5


def test_a_shared_tensor_counts_once_and_completes_its_layer(folder: Path):
    tensors, key = synthetic_tensors(), layer_key("vlm", 4)
    before = sum(array.size for array in tensors.values())
    size = tensors.pop(key).size
    write_weights(folder, tensors, metadata={key: layer_key("vlm", 2)})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shared == {key: layer_key("vlm", 2)}
    assert checkpoint.parameters() == before - size


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_library_is_known(tmp_path: Path, dtype: str):
    path = tmp_path / "x.safetensors"
    size = 24 * DTYPE_BITS[dtype] // 8
    join_file(path, {"a": {"dtype": dtype, "shape": [4, 6], "data_offsets": [0, size]}}, bytes(size))
    tensors, _ = read_header(path)
    with safe_open(path, "np") as library:
        assert library.get_slice("a").get_dtype() == tensors["a"].dtype
        assert tuple(library.get_slice("a").get_shape()) == tensors["a"].shape


def test_a_written_header_is_what_the_library_writes(folder: Path):
    tensors, metadata = read_header(weights(folder))
    written = encode_header(tensors.items(), metadata)
    assert len(written) % 8 == 0
    raw = weights(folder).read_bytes()
    assert json.loads(written[8:]) == json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


# Random damage: whatever our reader accepts, the library accepts and reads alike; it raises nothing but ClpError.


def _agrees_with_the_library(path: Path) -> None:
    try:
        tensors, metadata = read_header(path)
    except ClpError:
        return
    try:
        with safe_open(path, "np") as library:
            assert set(library.keys()) == tensors.keys()
            assert (library.metadata() or {}) == metadata
            for name, tensor in tensors.items():
                assert library.get_slice(name).get_dtype() == tensor.dtype
                assert tuple(library.get_slice(name).get_shape()) == tensor.shape
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what we accept: {error}") from error


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
_SIZES = st.integers(0, 9) | st.sampled_from([-1, 2**31, 2**63, True, 1.0, None])
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F", ""]) | _ANY_JSON,
        "shape": st.lists(_SIZES, max_size=3) | _ANY_JSON,
        "data_offsets": st.tuples(_SIZES, _SIZES).map(list) | _ANY_JSON,
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=6), _ENTRY | _ANY_JSON, max_size=3) | _ANY_JSON, data=st.binary(max_size=9)
)
def test_any_header_is_judged_as_the_library_does_or_more_strictly(tmp_path: Path, header: object, data: bytes):
    path = tmp_path / "x.safetensors"
    join_file(path, header, data)
    _agrees_with_the_library(path)


def test_any_corrupted_byte_is_judged_as_the_library_does_or_more_strictly(tmp_path: Path):
    rng = random.Random(0)
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.zeros((2, 3), np.float16), "b.c": np.zeros(4, np.float32), "d": np.zeros(0, np.int8)}
    save_file(tensors, path, metadata={"format": "pt"})
    sound = path.read_bytes()
    for _ in range(2000):
        raw = bytearray(sound)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            kind, position = rng.randrange(4), rng.randrange(len(raw))
            if kind == 0:
                raw[position] = rng.randrange(256)
            elif kind == 1:
                raw[position] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del raw[position : position + rng.randrange(1, 4)]
            else:
                raw[position:position] = bytes([rng.choice(b'0123456789,[]{}":\x00\xff')])
        path.write_bytes(raw)
        _agrees_with_the_library(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from(["type", "num_vlm_layers", "num_expert_layers", "self_attn_every_n_layers", "attention_mode"]),
        _ANY_JSON | st.integers(-2, 8) | st.just("smolvla"),
    )
)
def test_any_config_opens_or_is_refused(tmp_path: Path, fields: dict[str, object]):
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_synthetic(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "type": "smolvla", "num_vlm_layers": LAYERS, **fields}))
    try:
        checkpoint = Checkpoint.open(folder)
    except ClpError:
        return
    assert checkpoint.layers == {"vlm": LAYERS, "expert": LAYERS}


def test_opening_needs_neither_torch_nor_lerobot(folder: Path):
    code = (
        "import sys; from clp_ros.policies.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1]).fingerprint();"
        "print([name for name in ('torch', 'lerobot', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    output = subprocess.run(
        [sys.executable, "-c", code, folder],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ).stdout
    assert output.strip() == "[]"


def test_the_header_split_of_these_tests_is_the_file(folder: Path, tmp_path: Path):
    shutil.copy(weights(folder), tmp_path / "copy.safetensors")
    join_file(tmp_path / "copy.safetensors", *split_file(weights(folder)))
    assert read_header(tmp_path / "copy.safetensors")[0].keys() == read_header(weights(folder))[0].keys()
