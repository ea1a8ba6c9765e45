# SPDX-License-Identifier: Apache-2.0
"""The commands. Each creates a job's Request from its options, runs the job, and prints the Result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clp_ros.cli.output import (
    Bars,
    Status,
    counted,
    print_json,
    print_line,
    print_notes,
    print_plan,
    stdout_console,
)
from clp_ros.core import processes
from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    from clp_ros.jobs.benchmark import BenchmarkResult
    from clp_ros.jobs.calibrate import CalibrateResult
    from clp_ros.jobs.convert import ConvertResult
    from clp_ros.jobs.evaluate import EvaluateResult
    from clp_ros.jobs.finetune import FinetuneResult
    from clp_ros.jobs.make_checkpoint import MakeCheckpointResult
    from clp_ros.jobs.prune import PruneResult
    from clp_ros.jobs.record import RecordResult
    from clp_ros.jobs.request import Request, Result
    from clp_ros.jobs.verify import VerifyResult


def _request[R: Request](request: type[R], options: argparse.Namespace, **other: Any) -> R:
    """Returns a job's request. Its fields are the options of the same names, unless given here."""
    return request(**{name: value for name, value in vars(options).items() if name in request.model_fields} | other)


def _print_result(options: argparse.Namespace, result: Result, print_text: Callable[[], None]) -> None:
    """Prints a result as JSON if requested, otherwise as text."""
    if options.json:
        print_json(result.to_json())
    else:
        print_text()


def calibrate(options: argparse.Namespace) -> None:
    """Replays bags through a policy, in all processes, and compares its layers."""
    from clp_ros.jobs import calibrate

    request = _request(calibrate.CalibrateRequest, options)
    with Bars() as progress:
        result = calibrate.run(request, progress)
    if processes.rank() > 0:
        return
    _print_result(options, result, lambda: print_calibration(result, options.output))


def print_calibration(result: CalibrateResult, output: object) -> None:
    """Prints a calibration's removal sets and the next command."""
    print_plan(result.plan)
    frames, episodes = counted(result.meta["samples"], "frame"), counted(result.meta["episodes"], "episode")
    print_line(f"{frames} of {episodes}, heatmaps and report.html in {output}")
    print_line(f"next: {result.command}")


def prune(options: argparse.Namespace) -> None:
    """Writes a checkpoint without its redundant layers."""
    from clp_ros.jobs import prune
    from clp_ros.pruning.arguments import parse_budgets, parse_removals

    if options.output is None and not options.dry_run:
        options.usage("the following arguments are required: --output")
    if options.remove and (options.budget or options.threshold is not None or options.criterion is not None):
        options.usage("argument --remove: not allowed with --budget, --threshold or --criterion")
    request = _request(
        prune.PruneRequest,
        options,
        output=None if options.dry_run else options.output,
        removal=parse_removals(options.remove) if options.remove else None,
        budgets=parse_budgets(options.budget or []),
        criterion=options.criterion or "cka",
    )
    with Bars(notes=not options.json and not options.dry_run) as progress:
        result = prune.run(request, progress)
    if options.json:
        print_json(result.to_json())
    elif options.dry_run and result.plan is not None:
        print_plan(result.plan)
    else:
        print_removal(result, options.output)


def print_removal(result: PruneResult, output: object) -> None:
    """Prints which layers were removed or would be removed."""
    before, after = result.parameters["before"], result.parameters["after"]
    for name, layers in result.removed.items():
        print_line(f"{name}: removed {', '.join(map(str, layers)) or 'nothing'}; {result.layers[name]} layers left")
    where = "" if result.dry_run else f", in {output}"
    print_line(f"{before / 1e6:.2f} M -> {after / 1e6:.2f} M parameters{where}")
    if not result.dry_run and result.unchecked:
        print_line(f"not fully checked against lerobot: {result.unchecked}; run `clp verify` before it is used")


def inspect(options: argparse.Namespace) -> None:
    """Shows a checkpoint's layer stacks, or a calibration's scores."""
    from clp_ros.jobs import inspect

    result = inspect.run(_request(inspect.InspectRequest, options))
    if options.json:
        print_json(result.to_json())
        return
    from clp_ros.report.tables import inspection_table

    stdout_console().print(inspection_table(result.to_json()))


def benchmark(options: argparse.Namespace) -> None:
    """Measures checkpoints side by side."""
    from clp_ros.jobs import benchmark

    request = _request(benchmark.BenchmarkRequest, options)
    with Status() as progress:
        result = benchmark.run(request, progress)
    _print_result(options, result, lambda: print_comparison(result, options.markdown))


def print_comparison(result: BenchmarkResult, is_markdown: bool = False, title: str | None = None) -> None:
    """Prints the table of measurements."""
    from clp_ros.report.tables import benchmark_setting, comparison_table, paper_table, to_markdown

    setting = benchmark_setting(result.checkpoints)
    if is_markdown:
        print_line(f"{to_markdown(paper_table(result.checkpoints))}\n{setting}")
    else:
        stdout_console().print(comparison_table(result.checkpoints, title=title or setting))


def finetune(options: argparse.Namespace) -> None:
    """Fine-tunes a checkpoint on a LeRobotDataset, in all processes."""
    from clp_ros.jobs import finetune

    request = _request(finetune.FinetuneRequest, options)
    with Bars(notes=not options.json and processes.rank() == 0) as progress:
        result = finetune.run(request, progress)
    if processes.rank() == 0:
        _print_result(options, result, lambda: print_finetuning(result))


def print_finetuning(result: FinetuneResult) -> None:
    """Prints the losses and where the checkpoint is."""
    steps = counted(result.steps, "step")
    held_out = "" if result.held_out_last is None else f" (held-out episodes {result.held_out_last:.4f})"
    print_line(f"{steps}: loss {result.loss_first:.4f} -> {result.loss_last:.4f}{held_out}, in {result.output}")


def extract_head(options: argparse.Namespace) -> None:
    """Separates what a fine-tuning changed from its base."""
    from clp_ros.jobs import extract_head as job

    with Status() as progress:
        result = job.run(_request(job.ExtractHeadRequest, options), progress)
    share = f"{result.parameters / 1e6:.2f} M of {result.total / 1e6:.2f} M parameters"
    _print_result(
        options, result, lambda: print_line(f"{counted(result.tensors, 'tensor')}, {share}, in {result.output}")
    )


def apply_head(options: argparse.Namespace) -> None:
    """Makes a whole checkpoint of a base and a head."""
    from clp_ros.jobs import apply_head as job

    with Status() as progress:
        result = job.run(_request(job.ApplyHeadRequest, options), progress)
    _print_result(options, result, lambda: print_line(f"the fine-tuned checkpoint is in {result.output}"))


def make_checkpoint(options: argparse.Namespace) -> None:
    """Makes a checkpoint with random weights, offline."""
    from clp_ros.jobs import make_checkpoint

    request = _request(make_checkpoint.MakeCheckpointRequest, options)
    result = make_checkpoint.run(request)
    _print_result(options, result, lambda: print_made(result, options.size))


def print_made(result: MakeCheckpointResult, size: str) -> None:
    """Prints the new checkpoint's path and size."""
    print_line(f"{result.family}, {size}: {result.parameters / 1e6:.2f} M random parameters in {result.output}")


def verify(options: argparse.Namespace) -> None:
    """Loads a checkpoint strictly with stock lerobot, and runs it."""
    from clp_ros.jobs import verify

    result = verify.run(_request(verify.VerifyRequest, options))
    _print_result(options, result, lambda: print_verification(result, options.checkpoint))


def print_verification(result: VerifyResult, checkpoint: object) -> None:
    """Prints the results of the checks."""
    from clp_ros.policies.base import raw_values

    pruned = f"its manifest holds (source: {result.source})" if result.pruned else "it was never pruned"
    print_line(f"{checkpoint}: stock lerobot loads it strictly, one chunk is finite, {pruned}")
    if result.compiled_difference is not None:
        difference, tolerance = result.compiled_difference, result.compiled_tolerance
        print_line(f"compiled, its actions differ by {difference:.1e} of the largest (tolerance {tolerance:.0e})")
    if result.left_out_cameras:
        print_line(f"cameras left out, since its statistics do not name them: {', '.join(result.left_out_cameras)}")
    if result.raw_features:
        print_line(f"warning: {raw_values(result.raw_features)}; fine-tune it before it drives a robot")


def simulate(options: argparse.Namespace) -> None:
    """Runs a simulated robot behind the topics of the real one."""
    try:
        from clp_ros.nodes import simulation
    except ModuleNotFoundError as error:
        raise ClpError(
            "the simulation needs ROS 2", where=error.name, hint="source a ROS 2 environment, or install its wheels"
        ) from error
    given = {
        name: getattr(options, name)
        for name in ("embodiment", "tf_prefix", "task", "seed", "rate", "camera_rate", "pictures")
    }
    parameters = given | {"clock": options.clock or options.rate != 1}
    arguments = [part for name, value in parameters.items() for part in ("-p", f"{name}:={json.dumps(value)}")]
    if code := simulation.main(["--ros-args", *arguments]):
        raise SystemExit(code)


def record(options: argparse.Namespace) -> None:
    """Records demonstrations of a simulated robot, without ROS."""
    from clp_ros.jobs import record

    request = _request(record.RecordRequest, options)
    with Bars() as progress:
        result = record.run(request, progress)
    _print_result(options, result, lambda: print_recording(result, options.output or result.output.name))


def print_recording(result: RecordResult, output: object) -> None:
    """Prints how many episodes were recorded."""
    unsolved = result.tries - result.solved
    again = f"; {counted(unsolved, 'start')} left out, not solved" if unsolved else ""
    print_line(f"{counted(result.solved, 'episode')}, all solved{again}; {result.bytes / 1e6:.1f} MB in {output}")


def evaluate(options: argparse.Namespace) -> None:
    """Measures the success of checkpoints in closed loop."""
    from clp_ros.jobs import evaluate

    if options.env is None and not (options.embodiment and options.tasks):
        options.usage("--embodiment and --task, or --env, are required")
    request = _request(evaluate.EvaluateRequest, options, env_options=dict(map(_option, options.env_option)))
    with Bars() as progress:
        result = evaluate.run(request, progress)
    _print_result(options, result, lambda: print_success(result))


def _option(text: str) -> tuple[str, Any]:
    """Returns name and value of NAME=VALUE. The value is YAML, such as 30, true or [0,5]."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        return name.removeprefix("--env."), yaml.safe_load(value) if equals else True
    except yaml.YAMLError as error:
        raise ClpError(f"{value!r} is not a value", where=f"--env-option {name}", hint="write NAME=VALUE") from error


def print_success(result: EvaluateResult) -> None:
    """Prints the success rates, and the comparison of each pair."""
    from clp_ros.report.success_table import motion_lines, paired_lines, success_table

    document = result.to_json()
    stdout_console().print(success_table(document))
    for line in [*motion_lines(document), *paired_lines(document)]:
        print_line(line)
    if result.output is not None:
        print_line(f"outcomes and contact_sheet.png in {result.output}")


def convert(options: argparse.Namespace) -> None:
    """Converts bags into a LeRobotDataset. Bags that are left out are an error at the end."""
    from clp_ros.datasets.encoder_options import encoder_options
    from clp_ros.jobs import convert

    if options.merge is None and not (options.bags and options.embodiment):
        options.usage("the following arguments are required: --bag and --embodiment, or --merge")
    if options.resume and options.overwrite:
        options.usage("argument --resume: not allowed with --overwrite")
    merge = None if options.merge is None else tuple(options.merge)
    encoder = encoder_options(options.encoder or [])
    request = _request(convert.ConvertRequest, options, bags=tuple(options.bags), merge=merge, encoder=encoder)
    with Bars() as progress:
        result = convert.run(request, progress)
    _print_result(options, result, lambda: print_conversion(result, options.output))
    if result.left_out:
        raise ClpError(
            f"{counted(len(result.left_out), 'bag')} left out: {result.left_out[0].why}",
            where="clp convert",
            hint="correct them, and run the command again: it adds what is missing",
        )


def print_conversion(result: ConvertResult, output: object) -> None:
    """Prints the episodes added, the bags left out, and the dataset's size."""
    from clp_ros.report.tables import conversion_table

    added = [(one.bag.name, one.frames, one.task) for one in result.added]
    stdout_console().print(conversion_table(added, [(one.bag.name, one.why) for one in result.left_out]))
    print_notes(result)
    size = f"{counted(result.episodes, 'episode')}, {counted(result.frames, 'frame')} at {result.fps} Hz"
    print_line(f"{size} in {output}, {result.seconds:.1f} s" if result.episodes else "no dataset was written")
