# SPDX-License-Identifier: Apache-2.0
"""The jobs give what the version before they were moved gave: ``test/data/before_the_jobs.json``.

That file was made by the command line of the commit that it names, with LeRobot 0.6, from the same inputs.
"""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from clp_ros.jobs import calibrate, inspect, prune

BEFORE = json.loads((Path(__file__).parents[1] / "data" / "before_the_jobs.json").read_text())

pytestmark = pytest.mark.skipif(not version("lerobot").startswith("0.6"), reason="the results are of LeRobot 0.6")


def with_patterned_weights(source: Path, folder: Path) -> Path:
    """A copy whose weights are the bytes of a generator: random weights of PyTorch depend on the processor."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:start] + np.random.default_rng(0).bytes(len(content) - start))
    return folder


def hash_of_weights(file: Path) -> str:
    """SHA-256 of header and tensors. The spaces after the header differ: the version before aligned the tensors."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[8:start].rstrip(b" ") + content[start:]).hexdigest()


def without_paths(document, *folders: Path):
    """A JSON document with these folders replaced by their names."""
    text = json.dumps(document)
    for folder in folders:
        text = text.replace(str(folder), folder.name)
    return json.loads(text)


def assert_holds(found, before, where: str = "") -> None:
    """All that was there before is there, and equal; new fields may be there too."""
    if isinstance(before, dict):
        for name, value in before.items():
            assert name in found, f"{where}.{name}"
            assert_holds(found[name], value, f"{where}.{name}")
    elif isinstance(before, float) or (isinstance(before, list) and before and isinstance(before[0], float)):
        np.testing.assert_allclose(found, before, rtol=0, atol=1e-6, err_msg=where)
    elif isinstance(before, list) and before and isinstance(before[0], dict):
        assert len(found) == len(before), where
        for index, (one, other) in enumerate(zip(found, before, strict=True)):
            assert_holds(one, other, f"{where}[{index}]")
    else:
        assert found == before, where


def test_a_pruned_checkpoint_is_the_same(tiny_checkpoint, tmp_path):
    base, pruned = with_patterned_weights(tiny_checkpoint, tmp_path / "base"), tmp_path / "pruned"
    result = prune.run(prune.PruneRequest(checkpoint=base, output=pruned, removal={"vlm": (1, 2, 5, 6)}))
    assert hash_of_weights(pruned / "model.safetensors") == BEFORE["weights"]
    assert without_paths(json.loads((pruned / "config.json").read_text()), pruned) == BEFORE["config"]
    manifest = json.loads((pruned / "clp.json").read_text())
    assert_holds(without_paths(manifest, base, pruned), BEFORE["manifest"], "clp.json")
    assert_holds(without_paths(result.to_json(), base, pruned), BEFORE["prune"], "prune")
    found = inspect.run(inspect.InspectRequest(path=pruned)).to_json()
    assert_holds(without_paths(found, base, pruned), BEFORE["inspect"], "inspect")


def test_a_calibration_and_its_plan_are_the_same(tiny_checkpoint, recording, tmp_path):
    folder = tmp_path / "calibration"
    request = calibrate.CalibrateRequest(
        checkpoint=tiny_checkpoint,
        output=folder,
        bags=[recording],
        samples=8,
        device="cpu",
        embodiment="aloha_bimanual",
        task="transfer_cube",
    )
    result = calibrate.run(request)
    folders = (folder, tiny_checkpoint, recording)
    assert_holds(without_paths(result.to_json(), *folders), BEFORE["calibrate"], "calibrate")
    document = json.loads((folder / "calibration.json").read_text())
    assert_holds(without_paths(document, *folders), BEFORE["calibration"], "calibration.json")
    dry = prune.run(prune.PruneRequest(checkpoint=tiny_checkpoint, calibration=folder, output=None))
    assert_holds(dry.to_json(), BEFORE["plan"], "plan")
