# SPDX-License-Identifier: Apache-2.0
"""Units inside of layers: a family whose layers differ in width opens, and a plan that keeps some units is written.

The family stands for those with channels and heads to remove. Torch's own indexing says what must be left.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.units import UnitKind
from clp_ros.core.errors import ClpError
from clp_ros.policies import checkpoint as checkpoint_module
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.registry import families
from clp_ros.pruning.surgery import build_manifest, prune_checkpoint
from clp_ros.pruning.surgery_plan import SurgeryPlan
from clp_ros.pruning.surgery_writer import write_checkpoint

CHANNELS = {"mlp.up.weight": 0, "mlp.up.bias": 0, "mlp.down.weight": 1}
HEADS = {"attention.q.weight": 0, "attention.o.weight": 1}
WIDTHS = [12, 7, 12, 12]
HEAD_SIZE, DIM = 3, 5


def wide_stacks(config: Mapping) -> tuple[LayerStack, ...]:
    inner = tuple(
        (
            UnitKind("channels", width, dimensions=CHANNELS),
            UnitKind("heads", heads, dimensions=HEADS, size=HEAD_SIZE),
        )
        for width, heads in zip(config["widths"], config["heads"], strict=True)
    )
    return (LayerStack("blocks", "blocks", len(inner), "blocks.{layer}.", "blocks", inner_units=inner),)


def plain_stacks(config: Mapping) -> tuple[LayerStack, ...]:
    return (LayerStack("blocks", "blocks", len(config["widths"]), "blocks.{layer}.", "blocks"),)


def with_widths(config: Mapping, widths: Mapping) -> dict:
    layers = widths.get("blocks", ())
    return {**config, "widths": [one["channels"] for one in layers], "heads": [one["heads"] for one in layers]}


FAMILY = dataclasses.replace(
    families()["smolvla"],
    name="wide",
    layer_stacks=wide_stacks,
    with_depths=lambda config, depths: dict(config),
    with_widths=with_widths,
    tied={},
)


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"wide": FAMILY, "plain": dataclasses.replace(FAMILY, name="plain", layer_stacks=plain_stacks)}
    monkeypatch.setattr(checkpoint_module, "family_of", lambda config, where: known[config["type"]])


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = {"embedding.weight": torch.randn(9, DIM, generator=rng)}
    for layer, width in enumerate(WIDTHS):
        shapes = {"mlp.up.weight": (width, DIM), "mlp.up.bias": (width,), "mlp.down.weight": (DIM, width)}
        shapes |= {"attention.q.weight": (4 * HEAD_SIZE, DIM), "attention.o.weight": (DIM, 4 * HEAD_SIZE)}
        for rest, shape in shapes.items():
            made[f"blocks.{layer}.{rest}"] = torch.randn(shape, generator=rng).to(torch.bfloat16)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"type": "wide", "widths": WIDTHS, "heads": [4, 4, 4, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(plan: SurgeryPlan, folder: Path) -> dict:
    folder.mkdir()
    manifest = build_manifest(plan, "given", {}, {})
    write_checkpoint(plan, folder, folder, manifest, None)
    return manifest


def test_what_stays_of_the_units_is_what_torch_indexes(source: Path, tmp_path: Path):
    kept_inside = {"blocks": {0: {"channels": (0, 3, 4, 11)}, 1: {"channels": (2,), "heads": (1, 3)}}}
    plan = SurgeryPlan(Checkpoint.open(source), {"blocks": (0, 1, 3)}, kept_inside)
    once = write(plan, tmp_path / "once")
    assert plan.config == {"type": "wide", "widths": [4, 1, 12], "heads": [4, 2, 4]}
    expected = {}
    for new, old in enumerate((0, 1, 3)):
        for rest in (*CHANNELS, *HEADS):
            tensor = tensors()[f"blocks.{old}.{rest}"]
            kept = kept_inside["blocks"].get(old, {}).get("channels" if rest in CHANNELS else "heads")
            if kept is not None and rest in CHANNELS:
                tensor = tensor.index_select(CHANNELS[rest], torch.tensor(kept))
            elif kept is not None:
                rows = [head * HEAD_SIZE + row for head in kept for row in range(HEAD_SIZE)]
                tensor = tensor.index_select(HEADS[rest], torch.tensor(rows))
            expected[f"blocks.{new}.{rest}"] = tensor
    expected["embedding.weight"] = tensors()["embedding.weight"]
    found = load_file(tmp_path / "once" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    pruned = Checkpoint.open(tmp_path / "once")
    assert pruned.manifest == once
    assert pruned.parameters() == plan.parameters == sum(tensor.numel() for tensor in expected.values())
    assert once["modules"]["blocks"]["units"] == {
        "channels": {
            "0": {"original": 12, "removed": [1, 2, 5, 6, 7, 8, 9, 10]},
            "1": {"original": 7, "removed": [0, 1, 3, 4, 5, 6]},
        },
        "heads": {"1": {"original": 4, "removed": [0, 2]}},
    }

    # Pruned again, in the numbers of what is left: clp.json continues in those of the first source.
    again = SurgeryPlan(pruned, {"blocks": (0, 2)}, {"blocks": {0: {"channels": (1, 3)}, 2: {"heads": (0, 1, 2)}}})
    twice = write(again, tmp_path / "twice")
    assert Checkpoint.open(tmp_path / "twice").manifest == twice
    assert twice["modules"]["blocks"]["kept"] == [0, 3]
    assert twice["modules"]["blocks"]["units"] == {
        "channels": {"0": {"original": 12, "removed": [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]}},
        "heads": {"3": {"original": 4, "removed": [3]}},
    }
    up = load_file(tmp_path / "twice" / "model.safetensors")["blocks.0.mlp.up.weight"]
    assert torch.equal(up, tensors()["blocks.0.mlp.up.weight"][[3, 11]])


@pytest.mark.parametrize(
    ("units", "what"),
    [
        ({"channels": {"1": {"original": 7, "removed": [0]}}}, "leaves layer 0 of blocks 6 channels, .* gives it 7$"),
        ({"rows": {"3": {"original": 12, "removed": [0]}}}, "leaves layer 1 of blocks 11 rows, .* gives it none$"),
    ],
)
def test_a_manifest_of_other_widths_is_refused(source: Path, tmp_path: Path, units: dict, what: str):
    prune_checkpoint(source, tmp_path / "pruned", {"blocks": [0, 2]})
    manifest = json.loads((tmp_path / "pruned" / "clp.json").read_text())
    manifest["modules"]["blocks"]["units"] = units
    (tmp_path / "pruned" / "clp.json").write_text(json.dumps(manifest))
    with pytest.raises(ClpError) as caught:
        Checkpoint.open(tmp_path / "pruned")
    assert re.search(what, caught.value.what)
    assert "clp.json" in caught.value.where


def test_layers_of_unequal_width_are_pruned(source: Path, tmp_path: Path):
    prune_checkpoint(source, tmp_path / "pruned", {"blocks": [0, 2]})
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["widths"] == [7, 12]
    found = load_file(tmp_path / "pruned" / "model.safetensors")
    assert torch.equal(found["blocks.0.mlp.down.weight"], tensors()["blocks.1.mlp.down.weight"])
    assert Checkpoint.open(tmp_path / "pruned").layers == {"blocks": 2}


def test_a_shared_tensor_loses_no_units(source: Path):
    made = tensors()
    del made["blocks.2.mlp.up.bias"]
    notes = {"format": "pt", "blocks.2.mlp.up.bias": "blocks.0.mlp.up.bias"}
    save_file(made, source / "model.safetensors", metadata=notes)
    plan = SurgeryPlan(Checkpoint.open(source), {"blocks": (0, 1, 2, 3)}, {"blocks": {0: {"channels": (1, 2)}}})
    with pytest.raises(ClpError, match="is shared"):
        _ = plan.tensors


@pytest.mark.parametrize(
    ("layer", "rest", "shape", "reason"),
    [
        (1, "mlp.up.weight", (12, DIM), "config.json gives it 7 channels"),  # as its peers, not as the config says
        (0, "mlp.down.weight", (DIM, 11), "config.json gives it 12 channels"),
        (2, "attention.o.weight", (DIM, 4), "config.json gives it 4 heads"),
        (2, "mlp.down.weight", (DIM,), "config.json gives it 12 channels"),
        (3, "mlp.up.weight", (12, DIM + 1), "layer 3 of blocks has mlp.up.weight of shape"),
    ],
)
def test_a_layer_must_be_as_wide_as_the_config_says(
    source: Path, layer: int, rest: str, shape: tuple[int, ...], reason: str
):
    made = tensors() | {f"blocks.{layer}.{rest}": torch.zeros(shape)}
    save_file(made, source / "model.safetensors")
    with pytest.raises(ClpError, match=reason):
        Checkpoint.open(source)


def test_unequal_widths_are_refused_where_the_config_does_not_give_them(source: Path):
    assert Checkpoint.open(source).layers == {"blocks": 4}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"type": "plain"}))
    with pytest.raises(ClpError, match=r"layer 1 of blocks has mlp\.\w+\.\w+ of shape .*, the other layers"):
        Checkpoint.open(source)
