# SPDX-License-Identifier: Apache-2.0
"""Surgery: the result is the model without the layers, bit for bit, or there is no result and a reason."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_tools import (
    DAMAGES,
    LAYERS,
    edit_json,
    layer_key,
    remove_in_memory,
    split_file,
    synthetic_tensors,
    weights,
    write_synthetic,
    write_weights,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.manifest import Manifest
from clp_ros.core.errors import ClpError
from clp_ros.evaluation.verify import _check_manifest
from clp_ros.jobs import inspect
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.surgery import build_manifest, plan_surgery, prune_checkpoint

TABLE_5 = (1, 2, 5, 6, 14, 15)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_checkpoint(family_checkpoint: Callable[[str], Path]) -> Path:
    """A tiny SmolVLA of the real classes, 16 layers."""
    return family_checkpoint("smolvla")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A synthetic checkpoint of 6 layers, which needs no torch to make."""
    return write_synthetic(tmp_path / "source")


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The model that comes out


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def _stock(folder: Path) -> torch.nn.Module:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    return SmolVLAPolicy.from_pretrained(folder, strict=True)


def _chunk(policy: torch.nn.Module) -> torch.Tensor:
    config, rng = policy.config, torch.Generator().manual_seed(1)
    batch = {key: torch.rand(1, 3, 96, 128, generator=rng) for key in config.image_features}
    batch["observation.state"] = torch.randn(1, config.robot_state_feature.shape[0], generator=rng)
    batch["observation.language.tokens"] = torch.randint(0, 300, (1, 11), generator=rng)
    batch["observation.language.attention_mask"] = torch.ones(1, 11, dtype=torch.bool)
    noise = torch.randn(1, config.chunk_size, config.max_action_dim, generator=rng)
    with torch.no_grad():
        return policy.predict_action_chunk(batch, noise=noise)


@pytest.mark.parametrize("removed", [TABLE_5, (0, 1), (15,), (3, 4, 5, 6), tuple(range(2, 16))], ids=str)
def test_stock_lerobot_acts_as_with_the_layers_removed_in_memory(
    tiny_checkpoint: Path, tmp_path: Path, removed: tuple[int, ...]
):
    prune_checkpoint(tiny_checkpoint, tmp_path / "pruned", {"vlm": removed})
    reference = _stock(tiny_checkpoint)
    whole = _chunk(reference)
    both = {"vlm": removed, "expert": removed}
    reference = remove_in_memory(reference, Checkpoint.open(tiny_checkpoint).layer_stacks, both)
    pruned = _stock(tmp_path / "pruned")
    assert pruned.config.num_vlm_layers == 16 - len(removed)
    chunk = _chunk(pruned)
    assert torch.equal(chunk, _chunk(reference))
    assert not torch.equal(chunk, whole)  # the layers did something, so the comparison above can tell


def test_a_sharded_source_gives_the_same_single_file(tiny_checkpoint: Path, tmp_path: Path):
    from huggingface_hub import save_torch_state_dict

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path != weights(tiny_checkpoint):
            (sharded / path.name).symlink_to(path)
    save_torch_state_dict(load_file(weights(tiny_checkpoint)), sharded, max_shard_size="1MB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    for name, folder in (("one", tiny_checkpoint), ("many", sharded)):
        prune_checkpoint(folder, tmp_path / name, {"expert": TABLE_5})
    assert not list((tmp_path / "many").glob("model*index*")) + list((tmp_path / "many").glob("model-*"))
    one, many = load_file(weights(tmp_path / "one")), load_file(weights(tmp_path / "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(_chunk(_stock(tmp_path / "many")), _chunk(_stock(tmp_path / "one")))


def test_shards_of_any_dtype_order_come_out_aligned(tmp_path: Path):
    source = write_synthetic(tmp_path / "source")
    weights(source).unlink()
    tensors = {name: torch.from_numpy(array) for name, array in synthetic_tensors().items()}
    # An odd number of bytes before a float32: read from there, it would not be aligned.
    tensors["model.byte"] = torch.zeros(3, dtype=torch.uint8)
    names = sorted(tensors, key=lambda name: (tensors[name].element_size(), name))
    weight_map = {}
    for number, name in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        save_file({name: tensors[name]}, source / file, metadata={"format": "pt"})
        weight_map[name] = file
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": [1, 2]})
    loaded = load_file(weights(tmp_path / "pruned"))
    assert torch.equal(loaded["model.scale"], tensors["model.scale"])
    for tensor in Checkpoint.open(tmp_path / "pruned").tensors.values():
        assert tensor.elements == 0 or tensor.start % (tensor.nbytes // tensor.elements) == 0


# The folder that comes out


def test_kept_layers_are_the_sources_bytes_under_new_numbers(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": [1, 2, 5]})
    expected = {}
    for name, array in synthetic_tensors().items():
        for module in ("vlm", "expert"):
            for layer in range(LAYERS):
                if name.startswith(layer_key(module, layer, "")):
                    number = {0: 0, 3: 1, 4: 2}.get(layer)
                    name = None if number is None else name.replace(f"layers.{layer}.", f"layers.{number}.")
                    break
            if name is None:
                break
        if name is not None:
            assert name not in expected
            expected[name] = array
    with safe_open(weights(tmp_path / "pruned"), "np") as pruned:
        assert set(pruned.keys()) == expected.keys()
        for name, array in expected.items():
            found = pruned.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
        assert pruned.metadata() == {"format": "pt"}


def test_all_else_is_copied_and_paths_point_into_the_new_folder(source: Path, tmp_path: Path):
    before = _listing(source)
    target = tmp_path / "pruned"
    prune_checkpoint(source, target, {"vlm": [1, 2]})
    assert _listing(source) == before
    after = _listing(target)
    assert after.keys() == before.keys() | {"clp.json"}
    config = json.loads(before["config.json"])
    assert json.loads(after["config.json"]) == {**config, "num_vlm_layers": 4, "vlm_model_name": str(target / "vlm")}
    step = json.loads(after["policy_preprocessor.json"])["steps"][0]
    assert step["config"]["tokenizer_name"] == str(target / "vlm")
    changed = {"config.json", "policy_preprocessor.json", "model.safetensors", "clp.json"}
    for name in before.keys() - changed:
        assert after[name] == before[name]


def test_links_are_copied_as_what_they_lead_to(source: Path, tmp_path: Path):
    plain, linked = tmp_path / "a" / "out", tmp_path / "b" / "out"
    prune_checkpoint(source, plain, {"vlm": [1, 2]})
    hub = tmp_path / "hub"
    for name in _listing(source):
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).symlink_to(source / name)
    prune_checkpoint(hub, linked, {"vlm": [1, 2]})
    assert not [path for path in linked.rglob("*") if path.is_symlink()]
    rewritten = {"config.json", "policy_preprocessor.json", "clp.json"}
    for name, content in _listing(plain).items():
        assert name in rewritten or (linked / name).read_bytes() == content


def test_what_a_trainer_leaves_beside_the_weights_is_left_out(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "expected", {"vlm": [1, 2]})
    plain = Checkpoint.open(source)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.PT", "vlm/weights.ckpt"):
        (source / name).write_bytes(b"\x80\x04")  # no pickle that anything could read
    assert Checkpoint.open(source) == plain
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": [1, 2]})
    listings = [_listing(tmp_path / name) for name in ("pruned", "expected")]
    assert listings[0].keys() == listings[1].keys()
    assert listings[0]["model.safetensors"] == listings[1]["model.safetensors"]


def test_the_same_pruning_gives_the_same_bytes(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "out", {"vlm": [3, 4]}, scores={"vlm": [0.5] * 5})
    first = _listing(tmp_path / "out")
    prune_checkpoint(source, tmp_path / "out", {"expert": [4, 3]}, scores={"vlm": [0.5] * 5}, overwrite=True)
    assert _listing(tmp_path / "out") == first


def test_the_manifest_says_what_was_done(source: Path, tmp_path: Path):
    scores = {"vlm": [0.9, 0.8, 0.1, 0.2, 0.3]}
    manifest = prune_checkpoint(
        source,
        tmp_path / "pruned",
        {"vlm": [2, 1]},
        criterion="cka",
        thresholds={"vlm": 0.75, "expert": 0.75},
        scores=scores,
    )
    assert json.loads((tmp_path / "pruned" / "clp.json").read_text()) == manifest
    assert Checkpoint.open(tmp_path / "pruned").manifest == manifest
    Manifest.model_validate(manifest)
    base, pruned = Checkpoint.open(source), Checkpoint.open(tmp_path / "pruned")
    assert manifest["source"] == {"path": str(source), "fingerprint": base.fingerprint()}
    assert manifest["parameters"] == {"before": base.parameters(), "after": pruned.parameters()}
    assert (manifest["criterion"], manifest["threshold"], manifest["family"]) == ("cka", 0.75, "smolvla")
    assert manifest["modules"]["vlm"] == {
        "original_layers": 6,
        "removed": [1, 2],
        "kept": [0, 3, 4, 5],
        "threshold": 0.75,
        "scores": scores["vlm"],
        "units": {},
    }
    assert manifest["schema_version"] == 3
    assert manifest["modules"]["expert"]["removed"] == [1, 2]
    assert manifest["modules"]["expert"]["scores"] is None


def test_pruning_a_pruned_checkpoint_composes(source: Path, tmp_path: Path):
    once = prune_checkpoint(source, tmp_path / "once", {"vlm": [1, 2]}, criterion="cka")
    twice = prune_checkpoint(tmp_path / "once", tmp_path / "twice", {"vlm": [3]}, criterion="mse")
    direct = prune_checkpoint(source, tmp_path / "direct", {"vlm": [1, 2, 5]})
    # The same tensors in the same order; the blanks behind the headers differ with how the sources lie in pages.
    assert split_file(weights(tmp_path / "twice")) == split_file(weights(tmp_path / "direct"))
    assert twice["modules"] == direct["modules"]
    assert twice["source"] == direct["source"]
    assert twice["parameters"] == direct["parameters"]
    assert twice["criterion"] == "mse"
    assert [step["criterion"] for step in twice["steps"]] == ["cka", "mse"]
    assert twice["steps"][0] == once["steps"][0]
    assert twice["steps"][1]["source"]["fingerprint"] == Checkpoint.open(tmp_path / "once").fingerprint()
    assert twice["steps"][1]["modules"]["vlm"]["removed"] == [3]
    Manifest.model_validate(twice)


def test_thresholds_of_groups_stand_by_module(source: Path):
    towers = Checkpoint.open(source)
    apart = tuple(dataclasses.replace(module, group=module.name, pattern_period=1) for module in towers.layer_stacks)
    plan = plan_surgery(dataclasses.replace(towers, layer_stacks=apart), {"vlm": [1], "expert": [2, 3]})
    manifest = build_manifest(plan, "cka", {"vlm": 0.5, "expert": 0.75}, {})
    assert manifest["threshold"] is None
    assert {name: record["threshold"] for name, record in manifest["modules"].items()} == {"vlm": 0.5, "expert": 0.75}
    Manifest.model_validate(manifest)
    plan = plan_surgery(dataclasses.replace(towers, layer_stacks=apart), {"expert": [2, 3]})
    assert build_manifest(plan, "cka", {"vlm": None, "expert": 0.75}, {})["threshold"] == 0.75


def as_version(version: int) -> Callable[[Path], None]:
    """Turns the clp.json of a folder into what an earlier version of clp_ros wrote."""

    def older(manifest: dict) -> None:
        manifest["schema_version"] = version
        for part in (manifest, *manifest["steps"]):
            for record in part["modules"].values():
                del record["units"]
                if version == 1:
                    del record["threshold"]

    return edit_json("clp.json", older)


@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_of_an_earlier_version_is_read_and_continued(source: Path, tmp_path: Path, version: int):
    once = prune_checkpoint(source, tmp_path / "once", {"vlm": [1, 2]}, criterion="cka")
    as_version(version)(tmp_path / "once")
    first = Checkpoint.open(tmp_path / "once").manifest
    assert first["schema_version"] == version
    shown = inspect.run(inspect.InspectRequest(path=tmp_path / "once")).to_json()["manifest"]
    assert shown == first
    assert _check_manifest(Checkpoint.open(tmp_path / "once")) == "unchanged"
    twice = prune_checkpoint(tmp_path / "once", tmp_path / "twice", {"vlm": [3]}, thresholds={"vlm": 0.5})
    assert twice["schema_version"] == 3
    assert twice["steps"][0] == first["steps"][0]
    assert twice["modules"]["vlm"] | {"scores": None} == {
        "original_layers": 6,
        "removed": [1, 2, 5],
        "kept": [0, 3, 4],
        "threshold": 0.5,
        "scores": None,
        "units": {},
    }
    assert twice["source"] == once["source"]
    assert Checkpoint.open(tmp_path / "twice").manifest == twice


def test_a_manifest_of_a_later_version_is_refused(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": [1, 2]})
    edit_json("clp.json", lambda manifest: manifest.update(schema_version=4, more=[]))(tmp_path / "pruned")
    with pytest.raises(ClpError, match=r"schema_version is 4, and this version of clp_ros reads 1 to 3") as refused:
        Checkpoint.open(tmp_path / "pruned")
    assert refused.value.where == str(tmp_path / "pruned" / "clp.json")
    assert "install" in refused.value.hint


def test_a_manifest_of_other_weights_is_refused(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": [1, 2]})
    (source / "clp.json").write_bytes((tmp_path / "pruned" / "clp.json").read_bytes())
    with pytest.raises(ClpError, match=r"the manifest describes a smolvla of .*'vlm': 4"):
        Checkpoint.open(source)
    edit_json("clp.json", lambda manifest: manifest["modules"]["vlm"].update(kept=[0, 3, 4, 4]))(tmp_path / "pruned")
    with pytest.raises(ClpError, match="not a manifest"):
        Checkpoint.open(tmp_path / "pruned")


@pytest.mark.parametrize(
    ("removed", "stored", "aliases"),
    [
        ((3, 4), {"owner": 0}, {1: 0}),  # 1 and 5 share 0's tensor; both their numbers change
        ((1, 2), {"owner": 0}, {3: 0}),
        ((0, 1), {"owner": 3}, {}),  # the name it was stored under goes: 5 takes it over
    ],
    ids=str,
)
def test_shared_tensors_stay_shared_under_their_new_names(
    source: Path, tmp_path: Path, removed: tuple[int, ...], stored: Mapping[str, int], aliases: Mapping[int, int]
):
    tensors = synthetic_tensors()
    shared = tensors[layer_key("vlm", 0)]
    for layer in (1, 5):
        del tensors[layer_key("vlm", layer)]
    names = {layer_key("vlm", layer): layer_key("vlm", 0) for layer in (1, 5)}
    write_weights(source, tensors, metadata=names)
    prune_checkpoint(source, tmp_path / "pruned", {"vlm": removed})
    kept = [layer for layer in range(LAYERS) if layer not in removed]
    numbers = {kept.index(layer) for layer in (0, 1, 5) if layer in kept}
    with safe_open(weights(tmp_path / "pruned"), "np") as pruned:
        owner = layer_key("vlm", stored["owner"])
        assert pruned.get_tensor(owner).tobytes() == shared.tobytes()
        notes = {layer_key("vlm", layer): owner for layer in numbers - {stored["owner"]}}
        assert pruned.metadata() == {"format": "pt", **notes}
        assert not notes.keys() & set(pruned.keys())
    assert Checkpoint.open(tmp_path / "pruned").layers["vlm"] == len(kept)


# What is refused


@pytest.mark.parametrize(
    ("removal", "reason"),
    [
        ({}, "no layer to remove"),
        ({"vlm": [], "expert": ()}, "no layer to remove"),
        ({"llm": [1]}, "no module 'llm'"),
        ({"vlm": [6]}, "no layer 6"),
        ({"vlm": [-1]}, "no layer -1"),
        ({"vlm": [1, 1]}, "named twice"),
        ({"vlm": range(6)}, "no layer would be left"),
        ({"vlm": ["1"]}, "'1' is no layer number"),
        ({"vlm": [True]}, "True is no layer number"),
        ({"vlm": [1.0]}, "1.0 is no layer number"),
        ({"vlm": [1, 2], "expert": [3, 4]}, "must lose the same layers, not vlm [1, 2] and expert [3, 4]"),
        ({"vlm": [1, 2], "expert": [3, 4]}, "name one set for the group, as 1,2 or 3,4"),
        ({"vlm": [1, 2], "expert": [4]}, "name one set for the group, as 1,2 or 3,4"),
        ({"vlm": [1, 2], "expert": []}, "must lose the same layers"),
        ({"vlm": [1, 3]}, "remove 1,2 or 2,3"),
        ({"expert": [0]}, "would not alternate"),
    ],
    ids=str,
)
def test_an_impossible_removal_is_refused(source: Path, tmp_path: Path, removal: dict, reason: str):
    before = _listing(tmp_path)
    with pytest.raises(ClpError) as caught:
        prune_checkpoint(source, tmp_path / "pruned", removal)
    assert reason in str(caught.value)
    assert _listing(tmp_path) == before


@pytest.mark.parametrize(
    ("period", "fixed", "removed", "expected"),
    [
        (4, (), (1, 2, 3, 4), ""),
        (
            4,
            (),
            (5, 6),
            "module dit: without layers 5,6, its 4 kinds .* \\(hint: remove 3,4,5,6 or 4,5,6,7 or 5,6,7,8\\)$",
        ),
        (4, (), (1, 2, 3, 5), r"remove 1,2,3,4 or 2,3,4,5\)$"),
        (4, (), (8, 9, 10, 11), ""),
        (2, (3,), (3, 4), "module dit: layers 3 cannot be removed, .* \\(hint: remove 4,5\\)$"),
        (1, (0, 1, 2), (1, 5), "module dit: layers 1 cannot be removed, .* \\(hint: remove 5\\)$"),
        (1, (0, 1, 2), (3, 5), ""),
        (2, tuple(range(12)), (3, 4), "cannot be removed, .* \\(hint: remove nothing from dit\\)$"),
    ],
    ids=str,
)
def test_a_stacks_structure_is_data(
    source: Path, period: int, fixed: tuple[int, ...], removed: tuple[int, ...], expected: str
):
    module = LayerStack(
        "dit", "dit", 12, "dit.{layer}.", "dit", pattern_period=period, protected_layers=frozenset(fixed)
    )
    checkpoint = dataclasses.replace(Checkpoint.open(source), layer_stacks=(module,))
    with pytest.raises(ClpError, match=expected) if expected else contextlib.nullcontext():
        assert plan_surgery(checkpoint, {"dit": removed}).removal == {"dit": removed}


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "{}", '{"steps": {}}', '{"steps": ["tokenizer_processor"]}', '"a"'])
@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_processors_that_lerobot_could_not_read_are_refused(source: Path, tmp_path: Path, name: str, text: str):
    (source / name).write_text(text)
    with pytest.raises(ClpError, match=rf"{name}: (steps is not a list|not a JSON object)"):
        prune_checkpoint(source, tmp_path / "output" / "pruned", {"vlm": [1, 2]})
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_written_from_a_damaged_source(source: Path, tmp_path: Path, damage: str):
    DAMAGES[damage][0](source)
    output = tmp_path / "output"
    with pytest.raises(ClpError):
        prune_checkpoint(source, output / "pruned", {"vlm": [1, 2]})
    assert not output.exists()


def test_random_damage_is_refused_or_harmless(source: Path, tmp_path: Path):
    rng = random.Random(2)
    sound = weights(source).read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    refused = 0
    for number in range(300):
        raw = bytearray(sound)
        for _ in range(rng.choice([1, 1, 3])):
            raw[rng.randrange(header)] = rng.choice([*b'0123456789,[]{}":', rng.randrange(256)])
        weights(source).write_bytes(raw)
        output = tmp_path / "output" / str(number)
        try:
            prune_checkpoint(source, output, {"vlm": [1, 2]})
        except ClpError:
            refused += 1
            assert not output.parent.exists() or not list(output.parent.glob(f"*{number}*"))
            continue
        with safe_open(weights(output), "np") as pruned:  # say, a byte of a name outside of all layers
            assert len(list(pruned.keys())) == len(synthetic_tensors()) - 12
    assert refused > 200


@pytest.mark.parametrize("place", [".", "pruned", "vlm/pruned", ".."])
def test_an_output_in_the_source_or_around_it_is_refused(source: Path, place: str):
    before = _listing(source.parent)
    with pytest.raises(ClpError, match="in the source checkpoint or around it"):
        prune_checkpoint(source, source / place, {"vlm": [1, 2]}, overwrite=True)
    assert _listing(source.parent) == before


def test_a_linked_way_into_the_source_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ClpError, match="in the source checkpoint or around it"):
        prune_checkpoint(source, tmp_path / "link" / "pruned", {"vlm": [1, 2]})


def test_an_output_that_holds_something_needs_overwrite(source: Path, tmp_path: Path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine").write_text("")
    with pytest.raises(ClpError, match="not empty"):
        prune_checkpoint(source, output, {"vlm": [1, 2]})
    assert [path.name for path in output.iterdir()] == ["mine"]
    prune_checkpoint(source, output, {"vlm": [1, 2]}, overwrite=True)
    assert not (output / "mine").exists()
    assert Checkpoint.open(output).layers["vlm"] == 4


def test_a_disk_too_small_is_refused_before_writing(source: Path, tmp_path: Path):
    with (source / "huge.txt").open("wb") as file:
        try:
            file.truncate(2**43)  # 8 TiB that take no space
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
    with pytest.raises(ClpError, match="bytes free"):
        prune_checkpoint(source, tmp_path / "output" / "pruned", {"vlm": [1, 2]})
    assert not (tmp_path / "output").exists()


# Interruptions


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, interruption: type[BaseException]):
    output = tmp_path / "output"
    output.mkdir()
    prune_checkpoint(source, output / "old", {"vlm": [3, 4]})
    before = _listing(output)
    calls = []
    prune_checkpoint(source, tmp_path / "counted", {"vlm": [1, 2]}, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1]
    for last in range(1, len(calls) + 1):
        seen = []

        def interrupt(done: int, total: int, seen: list = seen, last: int = last) -> None:
            seen.append(done)
            if len(seen) == last:
                raise interruption

        with pytest.raises(interruption):
            prune_checkpoint(source, output / "old", {"vlm": [1, 2]}, overwrite=True, progress=interrupt)
        assert _listing(output) == before
        assert [path.name for path in output.iterdir()] == ["old"]


_PRUNE = """
import sys
from clp_ros.pruning.surgery import prune_checkpoint

def progress(done, total):
    if done * 2 > total:
        print("half", flush=True)
        sys.stdin.read()

prune_checkpoint(sys.argv[1], sys.argv[2], {"vlm": [1, 2]}, progress=progress)
"""


def _process(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


def _loads(folder: Path) -> bool:
    """Whether stock lerobot could take a folder: its settings can be read, and its weights are whole."""
    try:
        json.loads((folder / "config.json").read_text())
        with safe_open(weights(folder), "np") as tensors:
            return len(list(tensors.keys())) > 0
    except (OSError, ValueError, SafetensorError):
        return False


def _check_remains(folder: Path, allowed: Sequence[Mapping[str, bytes]], opens: Sequence[str]) -> None:
    """Checks that nothing in a folder loads but whole checkpoints, and opens but those under their own names."""
    for found in folder.iterdir():
        if _loads(found):
            assert _listing(found) in allowed
        if found.name in opens and found.is_dir():
            assert Checkpoint.open(found).layers
        else:
            with pytest.raises(ClpError):
                Checkpoint.open(found)


# Forks once a line "number output overwrite", and kills the fork when it does its number-th thing with a file.
_KILLED_AT = """
import os, signal, sys
from clp_ros.pruning.surgery import prune_checkpoint

def die_at(number):
    left = [number]

    def count(*_):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, _: count() if event.split(".")[0] in ("open", "os", "shutil", "fcntl") else None)
    return count

for line in sys.stdin:
    number, output, overwrite = line.split()
    child = os.fork()
    if not child:
        count = die_at(int(number))
        prune_checkpoint(sys.argv[1], output, {"vlm": [1, 2]}, overwrite=overwrite == "True", progress=count)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_file_operation_it_leaves_nothing_that_loads(source: Path, tmp_path: Path, overwrite: bool):
    output = tmp_path / "output" / "pruned"
    prune_checkpoint(source, output, {"vlm": [1, 2]})
    whole = _listing(output)
    shutil.rmtree(output)
    prune_checkpoint(source, output, {"vlm": [3, 4]})
    old = _listing(output)
    process = _process(_KILLED_AT, source, stdin=subprocess.PIPE)
    results, states = [], set()
    for number in itertools.count(1):
        if not overwrite:
            shutil.rmtree(output, ignore_errors=True)
        elif not output.exists() or number == 1 or _listing(output) != old:
            prune_checkpoint(source, output, {"vlm": [3, 4]}, overwrite=True)
        print(number, output, overwrite, file=process.stdin, flush=True)
        results.append(int(process.stdout.readline()))
        _check_remains(output.parent, [whole, old] if overwrite else [whole], ["pruned"])
        states.add(tuple(sorted(path.suffix for path in output.parent.iterdir())))
        if results[-1] == 0:
            break
    process.communicate()
    assert set(results[:-1]) == {-signal.SIGKILL}
    assert len(results) > 60
    assert ("", ".old") in states or not overwrite
    assert _listing(output) == whole
    assert [path.name for path in output.parent.iterdir()] == ["pruned"]  # what the killed ones left is gone


# At every file operation the test above kills it; this one, in between as well.
@pytest.mark.parametrize("kills", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_clp_prune_killed_at_any_time_leaves_nothing_that_loads(source: Path, tmp_path: Path, kills: int):
    tensors, rng = synthetic_tensors(), np.random.default_rng(0)
    for layer in range(LAYERS):
        tensors[layer_key("vlm", layer, "wide")] = rng.integers(-128, 127, 10 * 2**20, np.int8)
    write_weights(source, tensors)
    output = tmp_path / "output" / "pruned"
    output.parent.mkdir()
    # Without lerobot, whose model this checkpoint does not fit: `clp prune` compares the two before it writes.
    command = "import sys; sys.modules['lerobot'] = None; from clp_ros.cli import main; sys.exit(main())"
    arguments = ("prune", "--checkpoint", source, "--output", output, "--remove", "vlm=1,2")

    start = time.monotonic()
    with _process(command, *arguments) as process:
        process.communicate()
    seconds = time.monotonic() - start
    whole = _listing(output)
    killed = []
    for part in np.linspace(0.2, 1.0, kills):
        shutil.rmtree(output, ignore_errors=True)
        with _process(command, *arguments) as process:
            time.sleep(part * seconds)
            process.kill()
        killed.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL)
        _check_remains(output.parent, [whole], ["pruned"])
        assert output.exists() or killed[-1] != 0
    assert -signal.SIGKILL in killed
    shutil.rmtree(output, ignore_errors=True)
    with _process(command, *arguments) as process:
        process.communicate()
    assert _listing(output) == whole
    assert [path.name for path in output.parent.iterdir()] == ["pruned"]


def test_a_run_beside_another_leaves_its_folder_alone(source: Path, tmp_path: Path):
    output = tmp_path / "output" / "pruned"
    output.parent.mkdir()
    process = _process(_PRUNE, source, output, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "half\n"
    prune_checkpoint(source, output, {"vlm": [3, 4]})
    assert {path.suffix for path in output.parent.iterdir()} == {"", ".partial"}
    process.kill()
    process.communicate()
    prune_checkpoint(source, output, {"vlm": [3, 4]}, overwrite=True)
    assert [path.name for path in output.parent.iterdir()] == ["pruned"]


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(source: Path, tmp_path: Path):
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from clp_ros.core.errors import ClpError\n"
        "from clp_ros.pruning.surgery import prune_checkpoint\n"
        "try:\n    prune_checkpoint(sys.argv[1], sys.argv[2], {'vlm': [1, 2]})\n"
        "except ClpError as error:\n    print(error)"
    )
    output = tmp_path / "output"
    output.mkdir()
    process = _process(limited, source, output / "pruned")
    assert "the checkpoint cannot be written (File too large)" in process.communicate()[0]
    assert process.returncode == 0
    assert not list(output.iterdir())


# Lightness


def test_a_large_checkpoint_passes_through_little_memory_and_no_torch(source: Path, tmp_path: Path):
    tensors = synthetic_tensors()
    for layer in range(LAYERS):
        tensors[layer_key("vlm", layer, "wide")] = np.zeros((50 * 2**20,), np.int8)
    write_weights(source, tensors)
    code = (
        "import sys; from pathlib import Path\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "bare = peak()\n"
        "from clp_ros.pruning.surgery import prune_checkpoint\n"
        "prune_checkpoint(sys.argv[1], sys.argv[2], {'vlm': [1, 2]})\n"
        "print(peak() - bare, 'torch' in sys.modules)"
    )
    process = _process(code, source, tmp_path / "pruned")
    kibibytes, torch_loaded = process.communicate()[0].split()
    assert process.returncode == 0
    assert int(kibibytes) < 100 * 1024  # of 300 MiB of weights
    assert torch_loaded == "False"
