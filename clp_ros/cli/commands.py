# SPDX-License-Identifier: Apache-2.0
"""The jobs of the command line, each with its options. Heavy libraries are imported by the job that needs them."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from clp_ros.cli.output import (
    counted,
    print_json,
    print_line,
    print_notes,
    print_plan,
    print_warning,
    progress_bar,
    status_line,
    stdout_console,
)
from clp_ros.core.errors import ClpError


def calibrate(options: argparse.Namespace) -> None:
    """Replays bags through a policy, in each of the processes there are, and compares its layers."""
    from clp_ros.core import processes

    with processes.together():
        _calibrate_together(options)


def _calibrate_together(options: argparse.Namespace) -> None:
    """Calibrates, in each of the processes there are (one, but for torchrun's); the first writes and prints."""
    from clp_ros.bags.reader import open_bag
    from clp_ros.calibration.calibrate import calibrate_bags, given_statistics
    from clp_ros.core import processes
    from clp_ros.core.files import check_apart, check_output_folder
    from clp_ros.datasets.episodes import check_topics
    from clp_ros.policies.lerobot_policy import load_policy
    from clp_ros.pruning.plan import default_plan
    from clp_ros.report.calibration_report import write_calibration
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.robots.task import load_task

    check_apart(options.output, [options.checkpoint, *options.bag])
    check_output_folder(options.output, options.overwrite)
    embodiment = load_embodiment(options.embodiment)
    task = load_task(options.task, embodiment)
    for bag in options.bag:  # before the policy is loaded, which takes long
        check_topics(open_bag(bag), embodiment)
    statistics = given_statistics(options.statistics)
    policy = load_policy(options.checkpoint, processes.local_device(options.device), options.dtype, mapped=True)
    with progress_bar("scanning", "s") as scanned, progress_bar("calibrating", "frame") as progress:
        calibration = calibrate_bags(
            policy,
            options.bag,
            embodiment,
            task.instruction,
            options.samples,
            options.seed,
            progress,
            scanned,
            statistics=statistics,
            notify=print_warning if processes.rank() == 0 else None,
        )
    if processes.rank() > 0:
        return
    plan = default_plan(calibration, policy.checkpoint)
    words = ("clp", "prune", "--checkpoint", options.checkpoint, "--calibration", options.output)
    command = shlex.join([*map(str, words), "--output", f"{options.output}_pruned"])
    write_calibration(calibration, options.output, plan.report(), command=command, overwrite=options.overwrite)
    if options.json:
        print_json({"output": str(options.output.absolute()), **calibration.meta, "suggested": plan.removal})
        return
    print_plan(plan)
    meta = calibration.meta
    frames, episodes = counted(meta["samples"], "frame"), counted(meta["episodes"], "episode")
    print_line(f"{frames} of {episodes}, heatmaps and report.html in {options.output}")
    print_line(f"next: {command}")


def prune(options: argparse.Namespace) -> None:
    """Writes a checkpoint without its redundant layers."""
    from clp_ros.core.files import check_apart
    from clp_ros.jobs.arguments import parse_budgets, parse_removals
    from clp_ros.jobs.prune import plan_from_calibration, prune_by_plan, prune_layers

    if options.output is None and not options.dry_run:
        options.usage("the following arguments are required: --output")
    output = None if options.dry_run else options.output
    if options.remove:
        if options.budget or options.threshold is not None or options.criterion is not None:
            options.usage("argument --remove: not allowed with --budget, --threshold or --criterion")
        removal = parse_removals(options.remove)
        with progress_bar("pruning", "B") as progress:
            result = prune_layers(options.checkpoint, output, removal, overwrite=options.overwrite, progress=progress)
    else:
        plan = plan_from_calibration(
            options.checkpoint,
            options.calibration,
            parse_budgets(options.budget or []),
            options.threshold,
            options.criterion or "cka",
            options.seed,
        )
        if output is not None:
            check_apart(output, [options.checkpoint, options.calibration])
        if not options.json and not options.dry_run:
            print_notes(plan)
        with progress_bar("pruning", "B") as progress:
            result = prune_by_plan(options.checkpoint, output, plan, options.overwrite, progress)
        if options.dry_run and not options.json:
            print_plan(plan)
            return
    _print_removal(result, options)


def _print_removal(result: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print_json(result)
        return
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    for name, layers in result["removed"].items():
        print_line(f"{name}: removed {', '.join(map(str, layers)) or 'nothing'}; {result['layers'][name]} layers left")
    where = "" if options.dry_run else f", in {options.output}"
    print_line(f"{before / 1e6:.2f} M -> {after / 1e6:.2f} M parameters{where}")
    if not result["dry_run"] and (unchecked := result["unchecked"]):
        print_line(f"not checked against lerobot's model: {unchecked}; run `clp verify` before it is used")


def inspect(options: argparse.Namespace) -> None:
    """Shows a checkpoint's modules, or a calibration's scores."""
    from clp_ros.calibration.calibration_file import JSON_FILE
    from clp_ros.jobs.inspect import inspect_calibration, inspect_checkpoint

    is_calibration = (options.path / JSON_FILE).is_file()
    found = inspect_calibration(options.path) if is_calibration else inspect_checkpoint(options.path)
    if options.json:
        print_json(found)
        return
    from clp_ros.report.tables import inspection_table

    stdout_console().print(inspection_table(found))


def benchmark(options: argparse.Namespace) -> None:
    """Measures checkpoints side by side."""
    from clp_ros.evaluation.benchmark import benchmark
    from clp_ros.report.tables import benchmark_setting, comparison_table, paper_table, to_markdown

    with status_line() as say:
        result = benchmark(
            options.checkpoints,
            options.device,
            options.runs,
            options.warmup,
            train_step=options.train_step,
            progress=say,
            dtype=options.dtype,
            compiled=options.compile,
            alone=options.alone,
            run=options.run_them,
        )
    if options.json:
        print_json(result)
        return
    setting = benchmark_setting(result["checkpoints"])
    if options.markdown:
        print_line(f"{to_markdown(paper_table(result['checkpoints']))}\n{setting}")
    else:
        stdout_console().print(comparison_table(result["checkpoints"], title=setting))


def make_checkpoint(options: argparse.Namespace) -> None:
    """Makes a checkpoint with random weights, offline."""
    from safetensors import SafetensorError

    from clp_ros.core.files import atomic_folder
    from clp_ros.jobs.embodiment_features import embodiment_features
    from clp_ros.policies.checkpoint import Checkpoint
    from clp_ros.policies.family import check_lerobot, family_named
    from clp_ros.policies.features import LIBERO
    from clp_ros.policies.lerobot_policy import quiet
    from clp_ros.robots.embodiment import load_embodiment

    family = family_named(options.family)
    check_lerobot(family)
    features = embodiment_features(load_embodiment(options.embodiment)) if options.embodiment else LIBERO
    final = options.output.absolute()
    try:
        with atomic_folder(final, options.overwrite) as folder, quiet():
            family.make_checkpoint(options.size, folder, final, features, options.seed)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise ClpError(
            f"cannot write the checkpoint ({error})", where=final, fix="make room on the disk, or give another --output"
        ) from error
    made = Checkpoint.open(final)
    result = {"output": str(final), "family": family.name, "parameters": made.parameters(), "bytes": made.bytes}
    if options.json:
        print_json(result)
    else:
        print_line(f"{family.name}, {options.size}: {made.parameters() / 1e6:.2f} M random parameters in {final}")


def verify(options: argparse.Namespace) -> None:
    """Loads a checkpoint strictly with stock lerobot, and runs it."""
    from clp_ros.evaluation.verify import verify
    from clp_ros.policies.lerobot_policy import raw_values

    result = verify(options.checkpoint, options.device, options.compile)
    if options.json:
        print_json(result)
    else:
        pruned = f"its manifest holds (source: {result['source']})" if result["pruned"] else "it was never pruned"
        print_line(f"{options.checkpoint}: stock lerobot loads it strictly, one chunk is finite, {pruned}")
        if options.compile:
            difference, tolerance = result["compiled_difference"], result["compiled_tolerance"]
            print_line(f"compiled, its actions differ by {difference:.1e} of the largest (tolerance {tolerance:.0e})")
        if result["left_out_cameras"]:
            print_line(
                f"cameras left out, since its statistics do not name them: {', '.join(result['left_out_cameras'])}"
            )
        if result["raw_features"]:
            print_line(f"warning: {raw_values(result['raw_features'])}; fine-tune it before it drives a robot")


def simulate(options: argparse.Namespace) -> None:
    """Runs a simulated robot behind the topics of the real one."""
    try:
        from clp_ros.nodes import simulation
    except ModuleNotFoundError as error:
        raise ClpError(
            "simulating needs ROS 2", where=error.name, fix="source a ROS 2 environment, or install its wheels"
        ) from error
    given = {
        name: getattr(options, name) for name in ("embodiment", "tf_prefix", "seed", "rate", "camera_rate", "pictures")
    }
    parameters = given | {"clock": options.clock or options.rate != 1}
    arguments = [part for name, value in parameters.items() for part in ("-p", f"{name}:={json.dumps(value)}")]
    if code := simulation.main(["--ros-args", *arguments]):
        raise SystemExit(code)


def record(options: argparse.Namespace) -> None:
    """Records demonstrations of a simulated robot, without ROS."""
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.recording import RecordingSettings, record

    embodiment = load_embodiment(options.embodiment)
    output = options.output or Path(f"recorded_{embodiment.name}")
    settings = RecordingSettings(options.camera_rate, options.joint_state_rate, options.size, options.quality)
    with progress_bar("recording", "picture") as progress:
        episodes = record(embodiment, output, options.episodes, options.seed, settings, options.overwrite, progress)
    size = sum(file.stat().st_size for one in episodes for file in one.bag.iterdir())
    tries = sum(one.tries for one in episodes)
    if options.json:
        bags = [
            {"bag": str(one.bag.absolute()), "tries": one.tries, "seconds": one.seconds, "messages": one.messages}
            for one in episodes
        ]
        found = {"output": str(output.absolute()), "embodiment": embodiment.name, "seed": options.seed}
        print_json(found | {"solved": len(episodes), "tries": tries, "bytes": size, "episodes": bags})
        return
    again = f"; {counted(tries - len(episodes), 'start')} left out, not solved" if tries > len(episodes) else ""
    print_line(f"{counted(len(episodes), 'episode')}, all solved{again}; {size / 1e6:.1f} MB in {output}")


def demo(options: argparse.Namespace) -> None:
    """All of it on the recorded demonstration."""
    from clp_ros.cli.demo import run_demo

    run_demo(options.output, options.overwrite)
