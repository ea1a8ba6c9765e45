# SPDX-License-Identifier: Apache-2.0
"""Jobs as functions: requests that refuse what is wrong, results with one JSON form, no printing, no ROS."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clp_ros.checkpoints.manifest import Source
from clp_ros.cli.demo import command_words
from clp_ros.cli.parser import make_parser
from clp_ros.core.errors import ClpError
from clp_ros.jobs import benchmark, calibrate, demo, inspect, make_checkpoint, prune, record, verify
from clp_ros.jobs.progress import Progress
from clp_ros.jobs.request import Request, Result

FILES = sorted(Path(make_checkpoint.__file__).parent.glob("*.py"))
JOBS = [path for path in FILES if path.stem not in ("__init__", "progress", "request")]
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_a_request_a_result_and_run(path: Path) -> None:
    job = importlib.import_module(f"clp_ros.jobs.{path.stem}")
    own = [value for value in vars(job).values() if isinstance(value, type) and value.__module__ == job.__name__]
    (request,) = (value for value in own if issubclass(value, Request))
    assert any(issubclass(value, Result) for value in own)
    assert list(job.run.__annotations__)[:2] == ["request", "progress"]
    assert job.run.__annotations__["request"] == request.__name__


@by_file
def test_jobs_neither_print_nor_know_ros_or_options(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in imported}
    assert roots.isdisjoint({"argparse", "rclpy", "rich", "tqdm"})
    assert not any(name.startswith(("clp_ros.cli", "clp_ros.nodes")) for name in imported)
    assert not any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))


def test_importing_all_jobs_imports_no_large_library() -> None:
    names = ", ".join(f"clp_ros.jobs.{path.stem}" for path in JOBS)
    code = f"import {names}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "lerobot", "transformers", "matplotlib", "mujoco", "rclpy"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("request_type", "values", "fault"),
    [
        (make_checkpoint.MakeCheckpointRequest, {"family": "pi0", "size": "big", "output": "o"}, "size must be 'tiny'"),
        (make_checkpoint.MakeCheckpointRequest, {"family": "pi0", "size": "tiny"}, "output is missing"),
        (make_checkpoint.MakeCheckpointRequest, {"family": "f", "size": "tyny", "output": "o"}, "did you mean 'tiny'"),
        (verify.VerifyRequest, {"checkpoint": "c", "devise": "cpu"}, "did you mean 'device'"),
        (inspect.InspectRequest, {"pth": "c"}, "did you mean 'path'"),
        (demo.DemoRequest, {"output": 3}, "output .* not 3"),
        (benchmark.BenchmarkRequest, {"checkpoints": []}, "checkpoints must have at least 1"),
        (benchmark.BenchmarkRequest, {"checkpoints": ["c"], "warmup": -1}, "warmup must be at least 0, not -1"),
        (calibrate.CalibrateRequest, {"checkpoint": "c", "output": "o"}, "embodiment is missing"),
        (prune.PruneRequest, {"checkpoint": "c", "output": "o", "threshold": float("nan")}, "threshold must be a fin"),
        (prune.PruneRequest, {"checkpoint": "c", "output": "o"}, "^prune: give either a calibration or the layers"),
        (record.RecordRequest, {"embodiment": "ur5", "size": (8, 8)}, "size.0 must be at least 16, not 8"),
    ],
)
def test_a_wrong_request_is_refused_when_it_is_made(request_type: type, values: dict, fault: str) -> None:
    with pytest.raises(ClpError, match=fault):
        request_type(**values)


class Heard(Progress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.done: list[tuple[int, int]] = []

    def stage(self, title: str, unit: str = "") -> None:
        self.stages.append(title)

    def advance(self, done: int, total: int) -> None:
        self.done.append((done, total))


def test_a_job_runs_reports_and_gives_its_json(tiny_checkpoint: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    received = Heard()
    request = prune.PruneRequest(
        checkpoint=str(tiny_checkpoint), calibration=tiny_calibration, output=tmp_path / "pruned", budgets={"vlm": 2}
    )
    result = prune.run(request, received)
    assert received.stages == ["reading the calibration", "pruning"]
    assert received.done[-1][0] == received.done[-1][1] > 0
    assert json.loads(json.dumps(result.to_json())) == result.to_json()
    assert result.plan.removal == {name: tuple(layers) for name, layers in result.removed.items()}
    dry = prune.run(request.model_copy(update={"output": None}))
    assert (dry.output, dry.removed, dry.parameters) == (None, result.removed, result.parameters)
    found = inspect.run(inspect.InspectRequest(path=tmp_path / "pruned")).to_json()
    assert found["parameters"] == result.parameters["after"]


def test_progress_that_raises_cancels_the_job(tiny_checkpoint: Path, tmp_path: Path) -> None:
    class Cancel(Progress):
        def advance(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    request = prune.PruneRequest(checkpoint=tiny_checkpoint, output=tmp_path / "pruned", removal={"vlm": (1, 2)})
    with pytest.raises(KeyboardInterrupt):
        prune.run(request, Cancel())
    assert list(tmp_path.iterdir()) == []


RESULTS = [
    make_checkpoint.MakeCheckpointResult(output=Path("/o"), family="f", parameters=1, bytes=4),
    calibrate.CalibrateResult(output=Path("/o"), meta={"samples": 2}, suggested={"vlm": (1, 2)}, command="clp", plan=1),
    prune.PruneResult(
        output=None,
        dry_run=True,
        criterion="cka",
        threshold=0.5,
        thresholds={"vlm": 0.5},
        removed={"vlm": [1]},
        layers={"vlm": 3},
        units={"vlm": {"layers": {"removed": [1], "kept": [0, 2, 3]}}},
        parameters={"before": 2, "after": 1},
        notes=[],
        unchecked=None,
        plan=1,
    ),
    inspect.InspectedCheckpoint(
        path="/o", family="f", modules=[], parameters=1, bytes=2, fingerprint="0", manifest={"schema_version": 2}
    ),
    inspect.InspectedCalibration(
        path="/o",
        family="f",
        checkpoint=Source(path="/c", fingerprint="0"),
        samples=3,
        modules=[
            inspect.NamedScores(
                name="vlm",
                layers=2,
                group="vlm",
                period=1,
                dead_last=False,
                adjacent=[0.5],
                mse=[1.0],
                cosine=[0.25],
                more=1,
            )
        ],
    ),
    verify.VerifyResult(
        path="/o",
        family="f",
        layers={"vlm": 2},
        parameters=3,
        pruned=False,
        source="none",
        chunk=[50, 7],
        cameras=[],
        left_out_cameras=[],
        raw_features=[],
    ),
    benchmark.BenchmarkResult(checkpoints=[{"path": "/o", "latency_ms": 1.5}], ratios=[{"latency_ms": None}]),
    record.RecordResult(
        output=Path("/o"),
        embodiment="ur5",
        seed=2**64 - 1,
        solved=1,
        tries=2,
        bytes=3,
        episodes=[record.RecordedBag(bag=Path("/o"), tries=2, seconds=1.5, messages={"/joint_states": 4})],
    ),
    demo.DriveResult(seconds=None),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_goes_through_json_and_back(result: Result) -> None:
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document == result.to_json()
    again = type(result).from_json(document)
    assert again.to_json() == document
    shown = set(type(result).model_fields) - {"command", "plan", "calibration"}
    assert all(getattr(again, name) == getattr(result, name) for name in shown)


@pytest.mark.parametrize(
    "request_",
    [
        make_checkpoint.MakeCheckpointRequest(family="smolvla", size="tiny", embodiment="e", output="o u t"),
        calibrate.CalibrateRequest(checkpoint="c", bags=("a", "b"), embodiment="e", task="t", samples=3, output="o"),
        prune.PruneRequest(checkpoint="c", calibration="k", output="o", overwrite=True),
        verify.VerifyRequest(checkpoint="c"),
        benchmark.BenchmarkRequest(checkpoints=("a", "b"), device="cpu"),
    ],
    ids=lambda request: type(request).__name__,
)
def test_the_command_that_the_demo_shows_asks_for_the_same(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ran(Exception):
        pass

    def ran(request: Request, *_: object) -> None:
        raise Ran(request)

    job = importlib.import_module(type(request_).__module__)
    monkeypatch.setattr(job, "run", ran)
    options = make_parser().parse_args(command_words(request_))
    with pytest.raises(Ran) as caught:
        options.call(options)
    assert caught.value.args == (request_,)


def test_a_calibration_takes_each_bags_instruction_from_the_file_beside_it(
    tiny_checkpoint: Path, recording: Path, tmp_path: Path
) -> None:
    values = {"checkpoint": tiny_checkpoint, "embodiment": "aloha_bimanual", "samples": 4, "device": "cpu"}
    bags = [tmp_path / name for name in ("a", "b")]
    for bag in bags:
        shutil.copytree(recording, bag)
    with pytest.raises(ClpError, match=r"/a: the bag has no task \(hint: give --task, or write episodes.csv"):
        calibrate.run(calibrate.CalibrateRequest(**values, bags=bags, output=tmp_path / "none"))

    def scores(instructions: dict[str, str]) -> tuple[dict, str]:
        lines = "\n".join(f"{bag},{text}" for bag, text in instructions.items())
        (tmp_path / "episodes.csv").write_text(f"bag,instruction\n{lines}\n")
        result = calibrate.run(
            calibrate.CalibrateRequest(**values, bags=bags, output=tmp_path / "calibration", overwrite=True)
        )
        return result.calibration.matrices, result.meta["task"]

    given = calibrate.CalibrateRequest(**values, bags=bags, task="Lift it.", output=tmp_path / "given")
    expected = calibrate.run(given).calibration.matrices
    same, task = scores({"a": "Lift it.", "b": "Lift it."})
    assert task == "Lift it."
    assert all(np.array_equal(same[name], expected[name]) for name in expected)
    other, task = scores({"a": "Lift it.", "b": "Put the red cube into the bin."})
    assert task == "Lift it.; Put the red cube into the bin."
    assert not np.array_equal(other["vlm"], expected["vlm"])
