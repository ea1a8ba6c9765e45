# SPDX-License-Identifier: Apache-2.0
"""Calibration on the recorded demonstration: exact, seeded, readable, and refused when damaged."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hidden_state_tools import states_and_masks

from clp_ros.bags.reader import open_bag
from clp_ros.calibration.calibrate import Calibrator, calibrate_bags, draw_calibration_set
from clp_ros.calibration.calibration_file import Calibration
from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import read_frames, usable_ticks
from clp_ros.policies.features import LIBERO
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.random_weights import layer_gains
from clp_ros.policies.registry import family_named
from clp_ros.pruning.plan import default_plan
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.task import load_task

EMBODIMENT = load_embodiment("aloha_bimanual")
TASK = load_task("transfer_cube", EMBODIMENT).instruction


def cka(x, y):
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.sum((y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@pytest.fixture(scope="module")
def hidden(mapped_policy, recording):
    """Hidden states of the frames that 4 samples and seed 0 draw, concatenated, float64: {module: (L, tokens, dim)}."""
    reader = open_bag(recording)
    ticks = usable_ticks(reader, EMBODIMENT).usable
    drawn = np.sort(np.random.default_rng(0).choice(len(ticks), 4, replace=False))
    parts = {"vlm": [], "expert": []}
    for index, frame in enumerate(read_frames(reader, EMBODIMENT, ticks[drawn].tolist(), 50)):
        seen = frame.observation
        batch = mapped_policy.batch(seen.images, seen.state, TASK, frame.actions, frame.action_is_pad)
        states, masks = states_and_masks(mapped_policy, batch, [0, index])
        for name, layers in states.items():
            parts[name].append(np.stack([layer[masks[name]].double().numpy() for layer in layers]))
    return {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}


def test_scores_equal_the_formulas_on_all_tokens_at_once(tiny_calibration, hidden):
    found = Calibration.load(tiny_calibration)
    for name, layers in hidden.items():
        assert found.meta["tokens"][name] == layers.shape[1]
        matrix = found.matrices[name]
        for i in range(16):
            for j in range(16):
                assert matrix[i, j] == pytest.approx(cka(layers[i], layers[j]), abs=1e-9)
        np.testing.assert_array_equal(found.adjacent[name], [matrix[i, i + 1] for i in range(15)])
        for i in range(15):
            x, y = layers[i], layers[i + 1]
            assert found.mse[name][i] == pytest.approx(np.mean((x - y) ** 2), rel=1e-9)
            cosine = np.sum(x * y, axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
            assert found.cosine[name][i] == pytest.approx(cosine.mean(), abs=1e-9)


def test_many_tokens_are_thinned_for_all_pairs_and_counted_for_neighbours(
    tiny_calibration, mapped_policy, recording, hidden, monkeypatch
):
    """What the other pairs are compared by is seeded, evenly from the frames, and never more than the bound."""
    whole = Calibration.load(tiny_calibration)
    monkeypatch.setattr("clp_ros.calibration.calibrate.MATRIX_TOKENS", 202)
    part, again = (calibrate_bags(mapped_policy, [recording], EMBODIMENT, TASK, samples=4) for _ in range(2))
    assert part.meta["tokens"] == whole.meta["tokens"] == whole.meta["matrix_tokens"]
    # 202 tokens of 4 frames: 50, 51, 50 and 51; the expert has 50 a frame at most.
    assert part.meta["matrix_tokens"]["vlm"] == 202
    assert part.meta["matrix_tokens"]["expert"] <= 200
    for name in ("vlm", "expert"):
        np.testing.assert_array_equal(part.adjacent[name], whole.adjacent[name])
        np.testing.assert_array_equal(part.matrices[name], again.matrices[name])
    others = np.abs(np.subtract.outer(range(16), range(16))) > 1
    assert (part.matrices["vlm"][others] != whole.matrices["vlm"][others]).all()
    np.testing.assert_allclose(part.matrices["vlm"], whole.matrices["vlm"], atol=0.1)


def test_the_folder_says_how_it_was_made(tiny_calibration, tiny_checkpoint, tiny_policy, recording):
    document = json.loads((tiny_calibration / "calibration.json").read_text())
    assert document["schema_version"] == 1
    assert document["checkpoint"] == {
        "path": str(tiny_checkpoint),
        "fingerprint": tiny_policy.checkpoint.fingerprint(),
    }
    assert document["family"] == "smolvla"
    assert document["embodiment"] == "aloha_bimanual"
    assert document["task"] == TASK
    assert (document["samples"], document["seed"], document["dtype"]) == (4, 0, "float32")
    assert {"clp_ros", "python", "lerobot", "torch", "transformers", "numpy"} <= document["versions"].keys()
    (bag,) = document["bags"]
    reader = open_bag(recording)
    assert bag["fingerprint"] == reader.fingerprint()
    assert (bag["start_ns"], bag["end_ns"]) == (reader.start_ns, reader.end_ns)
    assert {name: topic["type"] for name, topic in bag["topics"].items()}.items() >= dict(EMBODIMENT.topics).items()
    for name in ("vlm", "expert"):
        module = document["modules"][name]
        assert (module["layers"], module["group"], len(module["adjacent"])) == (16, "vlm+expert", 15)
        assert (tiny_calibration / f"heatmap_{name}.png").read_bytes().startswith(b"\x89PNG")
    with zipfile.ZipFile(tiny_calibration / "cka.npz") as archive:
        assert archive.namelist() == ["vlm.npy", "expert.npy"]
    assert (tiny_calibration / "report.html").is_file()


def test_a_saved_calibration_loads_as_it_was_and_saves_to_the_same_bytes(tiny_calibration, tmp_path):
    Calibration.load(tiny_calibration).save(tmp_path)
    for name in ("calibration.json", "cka.npz"):
        assert (tmp_path / name).read_bytes() == (tiny_calibration / name).read_bytes()


def test_seeds_draw_other_frames_and_other_noise(mapped_policy, tiny_calibration, recording):
    same = calibrate_bags(mapped_policy, [recording], EMBODIMENT, TASK, samples=4, seed=0)
    other = calibrate_bags(mapped_policy, [recording], EMBODIMENT, TASK, samples=4, seed=1)
    kept = Calibration.load(tiny_calibration)
    for name in ("vlm", "expert"):
        np.testing.assert_array_equal(same.matrices[name], kept.matrices[name])
        assert not np.array_equal(other.matrices[name], kept.matrices[name])


def test_more_samples_than_ticks_over_several_bags(tiny_policy, recording, write_bag):
    # Two short pieces of the recording, of 0.3 s and 0.2 s; together they have fewer ticks than samples.
    pieces = []
    with open_bag(recording, "rosbags") as reader:
        wanted = list(reader.messages(list(EMBODIMENT.topics)))
    for start, seconds in ((2.0, 0.3), (5.0, 0.2)):
        first = wanted[0].receive_ns + int(start * 1e9)
        part = [m for m in wanted if first <= m.receive_ns < first + seconds * 1e9]
        pieces.append(write_bag([(m.topic, m.data, m.receive_ns) for m in part]))
    progress = []
    found = calibrate_bags(
        tiny_policy, pieces, EMBODIMENT, TASK, samples=1000, progress=lambda *step: progress.append(step)
    )
    ticks = [len(usable_ticks(open_bag(piece), EMBODIMENT).usable) for piece in pieces]
    assert found.meta["samples"] == sum(ticks) < 30
    assert found.meta["episodes"] == 2
    assert [bag["samples"] for bag in found.meta["bags"]] == ticks
    assert progress == [(done, sum(ticks)) for done in range(sum(ticks) + 1)]
    # Frames near the end have fewer actions than a chunk: their padding was left out.
    assert 0 < found.meta["tokens"]["expert"] < 50 * sum(ticks)


def test_the_scan_tells_how_far_it_is_and_can_be_ended(tiny_policy, recording):
    calls = []
    arguments = (tiny_policy, [recording, recording], EMBODIMENT, TASK)
    calibrate_bags(
        *arguments,
        samples=1,
        progress=lambda *step: calls.append(("frames", *step)),
        scanned=lambda *step: calls.append(("scan", *step)),
    )
    with open_bag(recording) as reader:
        total = 2 * (reader.end_ns - reader.start_ns) // 10**9
    scanned, frames = calls[:-2], calls[-2:]
    assert frames == [("frames", 0, 1), ("frames", 1, 1)]
    assert {(what, whole) for what, _, whole in scanned} == {("scan", total)}
    seconds = [done for _, done, _ in scanned]
    assert seconds == sorted(seconds)
    assert set(seconds) == set(range(total + 1))

    def end(*_):
        calls.append("ended")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_bags(*arguments, scanned=end)
    assert calls.count("ended") == 1


def test_drawing_is_even_over_all_ticks_and_seeded():
    assert [part.tolist() for part in draw_calibration_set([2, 0, 3], 99, 0)] == [[0, 1], [], [0, 1, 2]]
    counts = np.zeros(50)
    for seed in range(400):
        first, second = draw_calibration_set([20, 30], 10, seed)
        assert len(first) + len(second) == 10
        for part in (first, second):
            assert (np.diff(part) > 0).all()
        counts[first] += 1
        counts[20 + second] += 1
    # Each of 50 ticks is drawn with probability 0.2: 80 of 400 times, with a deviation of 8.
    assert abs(counts - 80).max() < 5 * 8
    assert all(map(np.array_equal, draw_calibration_set([20, 30], 10, 7), draw_calibration_set([20, 30], 10, 7)))


def test_wrong_arguments_are_told(tiny_policy, recording):
    for message, change in {
        "samples: the number is 0": {"samples": 0},
        "the seed is -1": {"seed": -1},
        "no bag is given": {"bags": []},
    }.items():
        arguments = {"bags": [recording], "embodiment": EMBODIMENT, "task": TASK, "samples": 2} | change
        with pytest.raises(ClpError, match=message):
            calibrate_bags(tiny_policy, **arguments)
    with pytest.raises(ClpError, match="no frame could be used"):
        Calibrator(tiny_policy, TASK).finish({})


@pytest.mark.parametrize(("module", "layer"), [("vlm", 5), ("expert", 6), ("expert", 0), ("vlm", 15)])
def test_a_layer_that_gives_nan_is_named(tiny_policy, recording, module, layer):
    path = next(m.layers_path for m in tiny_policy.modules if m.name == module)
    weight = tiny_policy.policy.get_submodule(f"{path}.{layer}").mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3, 4] = float("nan")
        with pytest.raises(ClpError, match=f"{module} layer {layer}: .*NaN or infinity"):
            calibrate_bags(tiny_policy, [recording], EMBODIMENT, TASK, samples=1)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.lerobot
@pytest.mark.parametrize("seed", [1, 2])
def test_layers_that_do_little_rank_as_redundant_and_the_best_allowed_set_goes(tmp_path, recording, seed):
    from clp_ros.jobs.make_checkpoint import embodiment_features

    with quiet():
        family_named("smolvla").make_checkpoint("tiny", tmp_path, tmp_path, embodiment_features(EMBODIMENT), seed)
    policy = load_policy(tmp_path, "cpu")
    found = calibrate_bags(policy, [recording], EMBODIMENT, TASK, samples=2)
    plan = default_plan(found, policy.checkpoint)
    scores = plan.scores["vlm"]

    # Exhaustive: pairs of neighbours and a run at the end are what can go without breaking the alternation.
    def sets(layer, left):
        if left == 0:
            yield ()
        elif layer <= 15:
            yield from sets(layer + 1, left)
            if left >= 2:
                yield from ((layer, layer + 1, *rest) for rest in sets(layer + 2, left - 2) if layer < 15)
            if layer == 16 - left:
                yield tuple(range(layer, 16))

    chosen = max(set(sets(1, 6)), key=lambda removed: sum(scores[i - 1] for i in removed))
    assert sum(scores[i - 1] for i in chosen) == pytest.approx(
        sum(scores[i - 1] for i in plan.removal["vlm"]), abs=1e-12
    )
    # What the made checkpoint promises: the smaller a layer's gain, the more alike what goes in and what comes out.
    gains = np.array(layer_gains(16, 2, seed)[1:])
    ranks = [np.argsort(np.argsort(x)) for x in (-gains, scores)]
    assert np.corrcoef(*ranks)[0, 1] > 0.5
    removed = np.array(plan.removal["vlm"])
    assert np.median(gains[removed - 1]) < np.median(np.delete(gains, removed - 1))


@pytest.mark.lerobot
def test_a_robot_that_does_not_fit_the_policy_is_refused(tmp_path, recording):
    with quiet():
        family_named("smolvla").make_checkpoint("tiny", tmp_path, tmp_path, LIBERO, 0)
    with pytest.raises(ClpError, match=r"the policy's cameras are .*image2; embodiment aloha_bimanual has"):
        calibrate_bags(load_policy(tmp_path, "cpu"), [recording], EMBODIMENT, TASK, samples=1)


# Damaged folders


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def edit(change):
    def damage(folder):
        document = json.loads((folder / "calibration.json").read_text())
        change(document)
        (folder / "calibration.json").write_text(json.dumps(document))

    return damage


def set_module(**fields):
    return edit(lambda document: document["modules"]["vlm"].update(fields))


def save_arrays(**arrays):
    def damage(folder):
        with np.load(folder / "cka.npz") as found:
            np.savez(folder / "cka.npz", **(dict(found) | arrays))

    return damage


def truncate(name, keep):
    def damage(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * keep)])

    return damage


def nan_everywhere(folder):
    edit(lambda d: d["modules"]["vlm"]["adjacent"].__setitem__(0, float("nan")))(folder)
    with np.load(folder / "cka.npz") as found:
        vlm = found["vlm"].copy()
    vlm[0, 1] = np.nan
    save_arrays(vlm=vlm)(folder)


DAMAGES = {
    "no folder": shutil.rmtree,
    "no json": lambda f: (f / "calibration.json").unlink(),
    "no arrays": lambda f: (f / "cka.npz").unlink(),
    "arrays are a folder": lambda f: ((f / "cka.npz").unlink(), (f / "cka.npz").mkdir()),
    "json cut": truncate("calibration.json", 0.5),
    "json empty": truncate("calibration.json", 0),
    "json no object": lambda f: (f / "calibration.json").write_text("[]"),
    "json no text": lambda f: (f / "calibration.json").write_bytes(b"\xff\xfe"),
    "json nested absurdly": lambda f: (f / "calibration.json").write_text("[" * 200_000),
    "json repeats a key": lambda f: (f / "calibration.json").write_text('{"schema_version": 1, "schema_version": 1}'),
    "other schema": edit(lambda d: d.update(schema_version=2)),
    "no schema": edit(lambda d: d.pop("schema_version")),
    "no modules": edit(lambda d: d.pop("modules")),
    "modules a list": edit(lambda d: d.update(modules=[])),
    "a module a number": edit(lambda d: d["modules"].update(vlm=1)),
    "a module missing": edit(lambda d: d["modules"].pop("vlm")),
    "a module too many": edit(lambda d: d["modules"].update(more=dict(d["modules"]["vlm"]))),
    "no fingerprint": edit(lambda d: d["checkpoint"].pop("fingerprint")),
    "checkpoint text": edit(lambda d: d.update(checkpoint="there")),
    "fingerprint a number": edit(lambda d: d["checkpoint"].update(fingerprint=1)),
    "no family": edit(lambda d: d.pop("family")),
    "fewer layers": set_module(layers=15),
    "layers text": set_module(layers="16"),
    "layers true": set_module(layers=True),
    "period 0": set_module(period=0),
    "period of one alone": set_module(period=3),
    "dead_last a number": set_module(dead_last=1),
    "group missing": edit(lambda d: d["modules"]["vlm"].pop("group")),
    "scores edited": edit(lambda d: d["modules"]["vlm"]["adjacent"].__setitem__(3, 0.5)),
    "scores text": set_module(mse=["a"] * 15),
    "scores too few": set_module(cosine=[1.0] * 14),
    "scores infinite": set_module(mse=[float("inf")] * 15),
    "scores not numbers": nan_everywhere,
    "arrays cut": truncate("cka.npz", 0.5),
    "arrays cut late": truncate("cka.npz", 0.99),
    "arrays empty": truncate("cka.npz", 0),
    "arrays text": lambda f: (f / "cka.npz").write_text("cka"),
    "arrays one array": lambda f: np.save((f / "cka.npz").open("wb"), np.eye(16)),
    "arrays pickled": lambda f: (f / "cka.npz").write_bytes(pickle.dumps(Bomb())),
    "an array pickled": save_arrays(vlm=np.array([[Bomb()]], dtype=object)),
    "an array of half precision": save_arrays(vlm=np.eye(16, dtype=np.float16)),
    "an array of another shape": save_arrays(vlm=np.ones((16, 15))),
    "an array too many": save_arrays(more=np.eye(3)),
    "another calibration's": save_arrays(vlm=np.eye(16)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused_and_nothing_is_unpickled(tiny_calibration, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_calibration, tmp_path / "calibration")
    Calibration.load(folder)
    DAMAGES[name](folder)
    with pytest.raises(ClpError) as reported:
        Calibration.load(folder)
    assert str(folder) in str(reported.value)
    assert not Path("unpickled").exists()


def test_any_flipped_or_missing_bytes_of_the_arrays_are_noticed(tiny_calibration, tmp_path):
    folder = shutil.copytree(tiny_calibration, tmp_path / "calibration")
    raw = (folder / "cka.npz").read_bytes()
    whole = Calibration.load(folder)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(raw)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(raw))]
        else:
            for place in rng.integers(len(raw), size=rng.integers(1, 4)):
                damaged[place] ^= 1 << int(rng.integers(8))
        (folder / "cka.npz").write_bytes(damaged)
        try:
            found = Calibration.load(folder)
        except ClpError:
            continue
        # A flip in a date or an attribute of the archive changes nothing that counts.
        assert all(np.array_equal(found.matrices[name], whole.matrices[name]) for name in whole.matrices)
