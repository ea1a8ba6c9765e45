# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by repository id, from a cache that is laid out as huggingface_hub lays it out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_tools import COMMIT, LFS_POINTER, ROOT, put_into_hub_cache, weights, write_synthetic
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from clp_ros.checkpoints import hub
from clp_ros.core.errors import ClpError, NotHereError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.surgery import prune_checkpoint

REPOSITORY = "someone/small_vla"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def snapshot(cache, tmp_path) -> Path:
    return put_into_hub_cache(write_synthetic(tmp_path / "made"), cache, REPOSITORY)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_repository_in_the_cache_is_a_checkpoint(snapshot, tmp_path, revision):
    assert snapshot_download(REPOSITORY) == str(snapshot)  # so the layout is the library's
    found = Checkpoint.open(REPOSITORY + revision)
    assert found.path == snapshot
    assert found.fingerprint() == Checkpoint.open(tmp_path / "made").fingerprint()
    assert found.files == Checkpoint.open(tmp_path / "made").files


def test_surgery_copies_what_the_links_lead_to(snapshot, tmp_path):
    prune_checkpoint(REPOSITORY, tmp_path / "pruned", {"vlm": [1, 2]})
    prune_checkpoint(tmp_path / "made", tmp_path / "expected", {"vlm": [1, 2]})
    pruned = {path.relative_to(tmp_path / "pruned"): path for path in (tmp_path / "pruned").rglob("*")}
    assert not any(path.is_symlink() for path in pruned.values())
    assert pruned.keys() == {path.relative_to(tmp_path / "expected") for path in (tmp_path / "expected").rglob("*")}
    assert weights(tmp_path / "pruned").read_bytes() == weights(tmp_path / "expected").read_bytes()
    manifests = [json.loads((tmp_path / name / "clp.json").read_text()) for name in ("pruned", "expected")]
    assert manifests[0]["source"]["fingerprint"] == manifests[1]["source"]["fingerprint"]


def test_a_folder_of_that_name_is_meant_where_there_is_one(snapshot, tmp_path):
    local = write_synthetic(tmp_path / REPOSITORY, seed=7)
    assert Checkpoint.open(REPOSITORY).path == local


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("someone/other", "hf download someone/other"),
        (f"{REPOSITORY}@v2.0", f"hf download {REPOSITORY} --revision v2.0"),
    ],
)
def test_offline_and_not_cached_names_the_command(snapshot, given, command):
    with pytest.raises(NotHereError) as caught:
        Checkpoint.open(given)
    assert str(caught.value).startswith(f"{given}: no such folder")
    assert "not in the Hub's cache" in str(caught.value)
    assert f"(hint: run `{command}` " in str(caught.value)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_a_repository_of_which_only_single_files_were_fetched_is_not_taken(snapshot, absent):
    (snapshot / absent).unlink()
    with pytest.raises(NotHereError, match="only partly in the Hub's cache"):
        Checkpoint.open(REPOSITORY)


def test_all_shards_make_a_repository_whole(cache, tmp_path):
    snapshot = put_into_hub_cache(write_synthetic(tmp_path / "made", shards=2), cache, REPOSITORY)
    assert Checkpoint.open(REPOSITORY).path == snapshot
    next(snapshot.glob("model-00002*")).unlink()
    with pytest.raises(NotHereError, match="only partly"):
        Checkpoint.open(REPOSITORY)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RepositoryNotFoundError, "neither a local folder nor a Hub repository"),
        (RevisionNotFoundError, "has no revision 'v3'"),
        (GatedRepoError, "is gated"),
        (ConnectionError, "cannot be downloaded now"),
    ],
)
def test_what_the_hub_answers_is_told(cache, monkeypatch, fault, words):
    import huggingface_hub

    def refuse(*_, local_files_only=False, **__):
        raise FileNotFoundError if local_files_only else fault.__new__(fault)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ClpError, match=words):
        Checkpoint.open(f"{REPOSITORY}@v3")


def test_what_is_not_cached_is_downloaded_without_pickles(cache, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, revision=None, local_files_only=False, ignore_patterns=()):
        if local_files_only:
            raise FileNotFoundError
        asked.append((repository, revision, "*.bin" in ignore_patterns))
        return put_into_hub_cache(write_synthetic(tmp_path / "made"), cache, repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open(f"{REPOSITORY}@v1.0").family.name == "smolvla"
    assert asked == [(REPOSITORY, "v1.0", True)]


@pytest.mark.parametrize("given", ["nowhere", "a/b/c", "/a/b", "../a", "a/b@", "a b/c", "~/model"])
def test_other_paths_are_paths(cache, given):
    assert hub.local_folder(given) == Path(given)
    with pytest.raises(ClpError, match="does not exist"):
        Checkpoint.open(given)


def test_clp_takes_a_repository_id_wherever_it_takes_a_checkpoint(tiny_checkpoint, tiny_calibration, tmp_path):
    """In a process of its own, told of the cache by the environment."""
    put_into_hub_cache(tiny_checkpoint, tmp_path / "hub", REPOSITORY)
    program = """
import sys
from clp_ros.cli import main
prune = ["prune", "--checkpoint", "someone/small_vla@main", "--calibration", sys.argv[1], "--output", "pruned"]
for arguments in (
    ["inspect", "someone/small_vla"],
    prune,
    ["verify", "pruned"],
    ["verify", "someone/small_vla"],
    ["benchmark", "someone/small_vla", "pruned", "--no-run"],
    ["inspect", "someone/other"],
):
    print(main([*arguments, "--json"]))
"""
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tiny_calibration)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[1::2] == ["0"] * 5, done.stderr
    assert lines[-1] == "1"
    (reported,) = done.stderr.splitlines()
    assert reported.startswith("error: ")
    assert "hf download someone/other" in reported
    assert json.loads(lines[4])["source"] == "unchanged"


def test_what_a_checkpoint_needs_of_the_hub_is_named(tiny_checkpoint, cache, tmp_path):
    """Offline, with a VLM and a tokenizer by the names that lerobot writes."""
    import shutil

    from clp_ros.jobs import prune
    from clp_ros.policies.loading import load_policy

    name = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "trained", ignore=shutil.ignore_patterns("vlm")))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace(json.loads(text)["vlm_model_name"], name))
    with pytest.raises(NotHereError, match=f"needs {name}, .*hf download {name}`"):
        load_policy(folder, "cpu")
    # Nothing of the VLM is needed to prune; only the comparison with lerobot's model cannot be made.
    request = prune.PruneRequest(checkpoint=folder, output=tmp_path / "pruned", removal={"vlm": (1, 2)})
    assert name in prune.run(request).unchecked

    tokenizer = "google/paligemma-3b-pt-224"
    text = (tiny_checkpoint / "policy_preprocessor.json").read_text()
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    document = json.loads(text)
    (step,) = (step for step in document["steps"] if step.get("registry_name") == "tokenizer_processor")
    step["config"]["tokenizer_name"] = tokenizer
    (folder / "policy_preprocessor.json").write_text(json.dumps(document))
    with pytest.raises(NotHereError, match=f"needs {tokenizer}"):
        load_policy(folder, "cpu")


def test_a_pointer_in_place_of_a_statistics_file_is_told(tmp_path):
    folder = write_synthetic(tmp_path / "made")
    (folder / "policy_preprocessor_step_5.safetensors").write_text(LFS_POINTER)
    with pytest.raises(ClpError, match="Git LFS pointer"):
        Checkpoint.open(folder)
