# SPDX-License-Identifier: Apache-2.0
"""Families of other distributions: found by their entry point, refused where they are faulty, and never in the way.

A distribution here is a folder on PYTHONPATH with a package and a ``*.dist-info``, as an installation leaves it.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warm_processes
from safetensors.numpy import load_file

from clp_ros.policies.registry import GROUP, built_in_families, families

FAMILY = '''
"""A stack of linear layers, as another distribution would add it."""
from pathlib import Path

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.policies.family import Family


def modules(config):
    return (LayerStack("blocks", "blocks", config["depth"], "model.blocks.{layer}.", "model.blocks", probe=None),)


def build(folder, device):
    import json
    from torch import nn

    config = json.loads((folder / "config.json").read_text())
    policy = nn.Module()
    policy.model = nn.Module()
    policy.model.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(config["depth"]))
    return policy


def forward(policy, batch, rng):
    raise NotImplementedError


FAMILY = Family(
    name="toy_vla",
    recognises=lambda config: config.get("type") == "toy_vla",
    layer_stacks=modules,
    with_depths=lambda config, depths: {**config, "depth": depths["blocks"]},
    rewrite_local_paths=lambda documents, folder, contents: None,
    default_ratio={"blocks": 1 / 3},
    build=build,
    forward=forward,
    synthetic="toy_vla.synthetic",
)
'''
SYNTHETIC = """
import json

import numpy as np
from safetensors.numpy import save_file


def make_checkpoint(family, size, folder, features, seed):
    depth = {"tiny": 6, "full": 60}[size]
    (folder / "config.json").write_text(json.dumps({"type": "toy_vla", "depth": depth}))
    rng = np.random.default_rng(seed)
    names = [f"model.blocks.{layer}.weight" for layer in range(depth)]
    save_file({name: rng.standard_normal((8, 8), dtype=np.float32) for name in names}, folder / "model.safetensors")
    for name in ("policy_preprocessor", "policy_postprocessor"):
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": []}))
"""
BROKEN = "import a_module_that_is_not_installed"


@pytest.fixture
def distribution(tmp_path: Path) -> Callable[..., Path]:
    """``distribution(name, {module: text}, {family: value})`` lays a distribution into a folder of its own."""

    def lay(name: str, modules: dict[str, str], entries: dict[str, str]) -> Path:
        place = tmp_path / f"site-{name}"
        for module, text in modules.items():
            path = place / f"{module.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        info = place / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{family} = {value}" for family, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        return place

    return lay


@pytest.fixture
def toy(distribution: Callable[..., Path]) -> Path:
    modules = {"toy_vla.family": FAMILY, "toy_vla.synthetic": SYNTHETIC}
    return distribution("toy-vla", modules, {"toy_vla": "toy_vla.family:FAMILY"})


@pytest.fixture
def broken(distribution: Callable[..., Path]) -> Path:
    return distribution("broken-vla", {"broken_vla.family": BROKEN}, {"broken": "broken_vla.family:FAMILY"})


def clp(*arguments: object, places: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
    """The command, in a process that has these distributions."""
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    return warm_processes.run(["-m", "clp_ros.cli", *map(str, arguments)], os.environ | {"PYTHONPATH": path})


def succeeded(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_family_of_another_distribution_is_made_inspected_and_pruned(toy: Path, broken: Path, tmp_path: Path) -> None:
    made, pruned, places = tmp_path / "made", tmp_path / "pruned", (broken, toy)
    make = ("make-checkpoint", "--family", "toy_vla", "--size", "tiny", "--seed", 3, "--output", made, "--json")
    assert succeeded(clp(*make, places=places))["parameters"] == 6 * 64
    found = succeeded(clp("inspect", made, "--json", places=places))
    assert found["family"] == "toy_vla"
    assert [(module["name"], module["layers"]) for module in found["modules"]] == [("blocks", 6)]
    prune = ("prune", "--checkpoint", made, "--output", pruned, "--remove", "blocks=1,4", "--json")
    result = succeeded(clp(*prune, places=places))
    assert result["layers"] == {"blocks": 4}
    assert result["unchecked"] is None  # held against the model that the family builds
    assert json.loads((pruned / "config.json").read_text())["depth"] == 4
    before, after = (load_file(folder / "model.safetensors") for folder in (made, pruned))
    for now, then in enumerate((0, 2, 3, 5)):
        np.testing.assert_array_equal(after[f"model.blocks.{now}.weight"], before[f"model.blocks.{then}.weight"])
    # Without the distribution nothing knows the checkpoint.
    assert "no known family recognises this config (type 'toy_vla')" in refused(clp("inspect", made, places=()))


def test_a_faulty_entry_is_named_where_it_is_needed_and_nowhere_else(
    broken: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = clp("inspect", tiny_checkpoint, "--json", places=(broken,))
    assert succeeded(result)["family"] == "smolvla"
    assert "broken" not in result.stderr
    named = refused(
        clp("make-checkpoint", "--family", "broken", "--size", "tiny", "--output", tmp_path / "x", places=(broken,))
    )
    assert "the distribution broken-vla does not load" in named
    assert "a_module_that_is_not_installed" in named
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"type": "broken"}')
    assert "the distribution broken-vla" in refused(clp("inspect", unknown, places=(broken,)))


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        (
            {"other": "toy_vla.family:FAMILY"},
            "toy_vla.family:FAMILY of the distribution odd-vla is the family 'toy_vla'",
        ),
        ({"other": "toy_vla.family:build"}, "toy_vla.family:build of the distribution odd-vla is not a Family"),
        ({"other": "toy_vla.family:NOTHING"}, "does not load (AttributeError"),
    ],
)
def test_an_entry_that_is_not_the_family_it_says_is_refused(
    distribution: Callable[..., Path], tmp_path: Path, entries: dict[str, str], what: str
) -> None:
    place = distribution("odd-vla", {"toy_vla.family": FAMILY}, entries)
    make = ("make-checkpoint", "--family", "other", "--size", "tiny", "--output", tmp_path / "made")
    assert what in refused(clp(*make, places=(place,)))


def test_two_distributions_cannot_share_a_name(toy: Path, distribution: Callable[..., Path], tmp_path: Path) -> None:
    other = distribution("copy-vla", {"copied.family": FAMILY}, {"toy_vla": "copied.family:FAMILY"})
    make = ("make-checkpoint", "--family", "toy_vla", "--size", "tiny", "--output", tmp_path / "made")
    error = refused(clp(*make, places=(toy, other)))
    assert "toy-vla" in error
    assert "copy-vla" in error
    assert "register a family of this name" in error


def test_no_distribution_takes_the_name_of_a_built_in_family(
    distribution: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    place = distribution("thief", {"toy_vla.family": FAMILY}, {"smolvla": "toy_vla.family:FAMILY"})
    result = clp("inspect", tiny_checkpoint, "--json", places=(place,))
    assert succeeded(result)["family"] == "smolvla"
    assert [module["name"] for module in json.loads(result.stdout)["modules"]] == ["vlm", "expert"]
    # Whoever looks for something else is told.
    make = ("make-checkpoint", "--family", "toy_vla", "--size", "tiny", "--output", tmp_path / "made")
    assert "the distribution thief registers a family 'smolvla'" in refused(clp(*make, places=(place,)))


def test_the_built_in_families_need_no_installation() -> None:
    assert set(built_in_families()) == {"groot", "groot_n1_7", "pi0", "pi05", "smolvla"}
    assert built_in_families().items() <= families().items()
