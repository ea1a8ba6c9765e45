# SPDX-License-Identifier: Apache-2.0
"""Checkpoints side by side, each in a process of its own; and what does not fit is refused before it is tried."""

import json
from pathlib import Path

import pytest
import torch

from clp_ros.core.errors import ClpError
from clp_ros.evaluation.benchmark import RATIOS, benchmark
from clp_ros.evaluation.flops import describe
from clp_ros.evaluation.measurement import Measurement, Setting, Worker
from clp_ros.policies.loading import load_policy
from clp_ros.pruning.surgery import prune_checkpoint

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "pruned"
    prune_checkpoint(tiny_checkpoint, folder, {"vlm": (1, 2, 5, 6, 14, 15)})
    return folder


@pytest.fixture(scope="module")
def described(tiny_checkpoint, pruned) -> list[dict]:
    return [describe(load_policy(folder, weights=False)) for folder in (tiny_checkpoint, pruned)]


@pytest.fixture
def setting(tiny_checkpoint) -> Setting:
    return Setting(tiny_checkpoint, "cpu", "auto", warmup=0, compile=False, train=True)


def test_checkpoints_are_measured_side_by_side(tiny_checkpoint, pruned, described):
    said = []
    result = benchmark([tiny_checkpoint, pruned], device="cpu", runs=2, warmup=1, progress=said.append)
    assert {line.split()[0] for line in said} == {"loading", "counting", "run", "training"}
    first, second = result["checkpoints"]
    for found, known in zip((first, second), described, strict=True):
        assert found.items() >= known.items()
        assert 0 < found["latency_ms"] <= found["latency_p90_ms"]
        assert found["train_step_ms"] > 0
        assert (found["device"], found["compile_s"]) == ("cpu", None)
        assert found["threads"] >= 1
        assert found["device_name"]
        # Its weights at least, and not what the imports take.
        assert 4 * found["parameters"] <= found["peak_memory"] < 600e6
    for key in RATIOS:
        assert result["ratios"][0][key] == 1
        assert result["ratios"][1][key] == first[key] / second[key]
    json.dumps(result, allow_nan=False)


def test_one_at_a_time_and_float32(tiny_checkpoint):
    said = []
    result = benchmark(
        [tiny_checkpoint], "cpu", 2, 0, train_step=False, progress=said.append, dtype="float32", alone=True
    )
    assert [line.split()[0] for line in said] == ["counting", "loading", "turn", "loading", "turn"]
    found = result["checkpoints"][0]
    assert found["latency_ms"] > 0
    assert "train_step_ms" not in found


def test_only_counting_runs_nothing(tiny_checkpoint, pruned, described):
    result = benchmark([tiny_checkpoint, pruned], run=False)
    assert result["checkpoints"] == described
    assert set(result["ratios"][1]) == {"parameters", "parameters_tied", "trainable", "gflops", "bytes"}


def test_training_steps_train_with_lerobots_optimizer_and_leave_no_gradients(setting):
    measurement = Measurement(setting)
    model = measurement.policy.policy
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    calls = []
    handle = model.model.action_out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.random.fork_rng(devices=[]):
        assert measurement.train_step_ms() > 0
    handle.remove()
    assert len(calls) == 4  # one to warm up
    for name, weight in model.named_parameters():
        assert weight.grad is None
        if not weight.requires_grad:
            assert torch.equal(weight, before[name])
    assert not torch.equal(model.model.action_out_proj.weight, before["model.action_out_proj.weight"])
    assert not model.training


def test_peak_memory_sees_what_was_held_and_let_go_while_predicting(setting):
    measurement = Measurement(setting)
    usual = measurement.peak_memory()
    measurement.policy.policy.model.action_out_proj.register_forward_hook(lambda *_: _take())
    measurement.latencies(1)
    assert measurement.peak_memory() >= usual + 150 * 1024**2


def _take() -> None:
    torch.ones(50 * 1024**2)  # 200 MiB, touched and freed


def test_what_the_memory_cannot_hold_is_refused_before_it_is_loaded(setting, monkeypatch):
    from clp_ros.evaluation import measurement

    monkeypatch.setattr(measurement, "_free_memory", lambda device: 1_000_000)
    with pytest.raises(ClpError, match=r"a training step's weights, .* 0\.0 GB free.*--no-train-step"):
        Measurement(setting)


def test_a_fault_in_the_other_process_is_told_here(tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    setting = Setting(damaged, "cpu", "auto", 0, False, False)
    with Worker(setting) as worker, pytest.raises(ClpError, match=r"config\.json") as reported:
        worker.load()
    assert reported.value.hint


def test_a_killed_process_is_told(setting):
    import os
    import signal

    with Worker(setting) as worker, pytest.raises(ClpError, match="killed, by a signal or for lack of memory"):
        worker._call(os.kill, worker._pool.submit(os.getpid).result(), signal.SIGKILL)


def test_wrong_arguments_are_told(tiny_checkpoint, tmp_path):
    with pytest.raises(ClpError, match="runs: the number is 0"):
        benchmark([tiny_checkpoint], runs=0)
    with pytest.raises(ClpError, match="no checkpoint is given"):
        benchmark([])
    with pytest.raises(ClpError, match="does not exist"):
        benchmark([tmp_path / "nowhere"])
