# SPDX-License-Identifier: Apache-2.0
"""The ``clp`` command: a sub-command per job. Heavy libraries are imported by the job that needs them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros import __version__
from clp_ros.errors import ClpError

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 done; 1 a fault the user can fix, told in one line on stderr; 2 wrong usage; 130 interrupted.
    """
    try:
        run(arguments)
        sys.stdout.flush()  # so that a pipe closed early shows here
    except ClpError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `clp inspect … | head` is no fault
    except OSError as error:  # a disk too full, a file taken away: not ours to foresee, but the user's to mend
        fix = "check the files and the room on the disk"
        print(f"error: {ClpError(error.strerror or repr(error), where=error.filename, fix=fix)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; faults are the caller's to tell.

    Raises:
        ClpError: A fault the user can fix.
        SystemExit: Wrong usage, or --help.
    """
    options = _parser().parse_args(arguments)
    options.run(options)


def _calibrate(options: argparse.Namespace) -> None:
    from clp_ros.pruning import processes

    with processes.together():
        _calibrate_together(options)


def _calibrate_together(options: argparse.Namespace) -> None:
    """Calibrates, in each of the processes there are (one, but for torchrun's); the first writes and prints."""
    from clp_ros.bags.reader import open_bag
    from clp_ros.files import check_apart, check_output_folder
    from clp_ros.pruning import processes
    from clp_ros.pruning.calibration import calibrate_bags
    from clp_ros.pruning.plan import default_plan
    from clp_ros.report.calibration_report import write_calibration
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.robots.episode import check_topics
    from clp_ros.robots.task import load_task
    from clp_ros.vla.policy import load_policy

    check_apart(options.output, [options.checkpoint, *options.bag])
    check_output_folder(options.output, options.overwrite)
    embodiment = load_embodiment(options.embodiment)
    task = load_task(options.task, embodiment)
    for bag in options.bag:  # before the policy is loaded, which takes long
        check_topics(open_bag(bag), embodiment)
    policy = load_policy(options.checkpoint, processes.local_device(options.device), options.dtype, mapped=True)
    with _progress("scanning", "s") as scanned, _progress("calibrating", "frame") as progress:
        calibration = calibrate_bags(
            policy, options.bag, embodiment, task.instruction, options.samples, options.seed, progress, scanned
        )
    if processes.rank() > 0:
        return
    plan = default_plan(calibration, policy.checkpoint)
    words = ("clp", "prune", "--checkpoint", options.checkpoint, "--calibration", options.output)
    beside = options.output if options.output.name.strip(".") else options.output.resolve()  # "." has no name to extend
    command = shlex.join([*map(str, words), "--output", f"{beside}_pruned"])
    write_calibration(calibration, options.output, plan.report(), command=command, overwrite=options.overwrite)
    if options.json:
        _print_json({"output": str(options.output.absolute()), **calibration.meta, "suggested": plan.removal})
        return
    _print_plan(plan)
    meta = calibration.meta
    frames, episodes = _count(meta["samples"], "frame"), _count(meta["episodes"], "episode")
    _say(f"{frames} of {episodes}, heatmaps and report.html in {options.output}")
    _say(f"next: {command}")


def _prune(options: argparse.Namespace) -> None:
    from clp_ros.pruning.arguments import parse_budgets, parse_removals
    from clp_ros.pruning.prune import plan_from_calibration, prune_by_plan, summary
    from clp_ros.pruning.surgery import plan_surgery, prune_checkpoint
    from clp_ros.vla.checkpoint import Checkpoint

    if options.output is None and not options.dry_run:
        options.usage("the following arguments are required: --output")
    if options.remove:
        if options.budget or options.threshold is not None or options.criterion is not None:
            options.usage("argument --remove: not allowed with --budget, --threshold or --criterion")
        removal = parse_removals(options.remove)
        if options.dry_run:
            source = Checkpoint.open(options.checkpoint)
            surgery = plan_surgery(source, removal)
            layers = {name: len(kept) for name, kept in surgery.kept.items()}
            parameters = {"before": source.parameters(), "after": surgery.parameters}
            _print_removal({"removed": surgery.removal, "layers": layers, "parameters": parameters}, options)
            return
        with _progress("pruning", "B") as progress:
            manifest = prune_checkpoint(
                options.checkpoint, options.output, removal, overwrite=options.overwrite, progress=progress
            )
    else:
        plan = plan_from_calibration(
            options.checkpoint,
            options.calibration,
            parse_budgets(options.budget or []),
            options.threshold,
            options.criterion or "cka",
            options.seed,
        )
        if options.dry_run:
            if options.json:
                _print_json({"criterion": plan.criterion, "threshold": plan.thresholds, "removed": plan.removal})
            else:
                _print_plan(plan)
            return
        if not options.json:
            _print_notes(plan)
        with _progress("pruning", "B") as progress:
            manifest = prune_by_plan(options.checkpoint, options.output, plan, options.overwrite, progress)
    _print_removal(summary(manifest, options.output), options)


def _print_removal(result: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        _print_json(result)
        return
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    for name, layers in result["removed"].items():
        _say(f"{name}: removed {', '.join(map(str, layers)) or 'nothing'}; {result['layers'][name]} layers left")
    where = "" if options.dry_run else f", in {options.output}"
    _say(f"{before / 1e6:.2f} M -> {after / 1e6:.2f} M parameters{where}")


def _inspect(options: argparse.Namespace) -> None:
    from clp_ros.pruning.calibration import JSON_FILE
    from clp_ros.pruning.inspection import inspect_calibration, inspect_checkpoint

    is_calibration = (options.path / JSON_FILE).is_file()
    found = inspect_calibration(options.path) if is_calibration else inspect_checkpoint(options.path)
    if options.json:
        _print_json(found)
        return
    from clp_ros.report.tables import inspection_table

    _console().print(inspection_table(found))


def _benchmark(options: argparse.Namespace) -> None:
    from clp_ros.pruning.benchmark import benchmark
    from clp_ros.report.tables import benchmark_setting, comparison_table, paper_table, to_markdown

    with _status() as say:
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
        _print_json(result)
        return
    setting = benchmark_setting(result["checkpoints"])
    if options.markdown:
        _say(f"{to_markdown(paper_table(result['checkpoints']))}\n{setting}")
    else:
        _console().print(comparison_table(result["checkpoints"], title=setting))


def _make_checkpoint(options: argparse.Namespace) -> None:
    from safetensors import SafetensorError

    from clp_ros.files import atomic_folder
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.robots.features import embodiment_features
    from clp_ros.vla.checkpoint import Checkpoint
    from clp_ros.vla.family import check_lerobot, family_named
    from clp_ros.vla.features import LIBERO
    from clp_ros.vla.policy import quiet

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
        _print_json(result)
    else:
        _say(f"{family.name}, {options.size}: {made.parameters() / 1e6:.2f} M random parameters in {final}")


def _verify(options: argparse.Namespace) -> None:
    from clp_ros.pruning.verify import verify

    result = verify(options.checkpoint, options.device, options.compile)
    if options.json:
        _print_json(result)
    else:
        pruned = f"its manifest holds (source: {result['source']})" if result["pruned"] else "it was never pruned"
        _say(f"{options.checkpoint}: stock lerobot loads it strictly, one chunk is finite, {pruned}")
        if options.compile:
            difference, tolerance = result["compiled_difference"], result["compiled_tolerance"]
            _say(f"compiled, its actions differ by {difference:.1e} of the largest (tolerance {tolerance:.0e})")


def _simulate(options: argparse.Namespace) -> None:
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


def _record(options: argparse.Namespace) -> None:
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.recording import RecordingSettings, record

    embodiment = load_embodiment(options.embodiment)
    output = options.output or Path(f"recorded_{embodiment.name}")
    settings = RecordingSettings(options.camera_rate, options.joint_state_rate, options.size, options.quality)
    with _progress("recording", "picture") as progress:
        episodes = record(embodiment, output, options.episodes, options.seed, settings, options.overwrite, progress)
    size = sum(file.stat().st_size for one in episodes for file in one.bag.iterdir())
    tries = sum(one.tries for one in episodes)
    if options.json:
        bags = [
            {"bag": str(one.bag.absolute()), "tries": one.tries, "seconds": one.seconds, "messages": one.messages}
            for one in episodes
        ]
        found = {"output": str(output.absolute()), "embodiment": embodiment.name, "seed": options.seed}
        _print_json(found | {"solved": len(episodes), "tries": tries, "bytes": size, "episodes": bags})
        return
    again = f"; {_count(tries - len(episodes), 'start')} left out, not solved" if tries > len(episodes) else ""
    _say(f"{_count(len(episodes), 'episode')}, all solved{again}; {size / 1e6:.1f} MB in {output}")


def _demo(options: argparse.Namespace) -> None:
    from clp_ros.demo import run_demo

    run_demo(options.output, options.overwrite)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clp", description="Prunes the redundant layers of vision-language-action policies, and runs them."
    )
    parser.add_argument("--version", action="version", version=f"clp {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    calibrate = _command(commands, "calibrate", _calibrate, "replay bags through a policy and compare its layers")
    calibrate.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder")
    calibrate.add_argument("--bag", required=True, nargs="+", type=Path, help="rosbag2 recordings, an episode each")
    calibrate.add_argument("--embodiment", required=True, help="name under config/embodiments, or a .yaml file")
    calibrate.add_argument("--task", required=True, help="name under config/tasks, a .yaml file, or the instruction")
    calibrate.add_argument("--output", required=True, type=Path, help="calibration folder to write")
    calibrate.add_argument("--samples", type=int, default=64, help="frames to calibrate on (default: %(default)s)")
    calibrate.add_argument("--seed", type=_seed, default=0, help="draws frames, noise and time (default: %(default)s)")
    _device(calibrate)
    calibrate.add_argument("--dtype", default="auto", help="auto (as lerobot loads it) or float32")

    prune = _command(commands, "prune", _prune, "write a checkpoint without its redundant layers")
    prune.add_argument("--checkpoint", required=True, type=Path, help="checkpoint folder")
    what = prune.add_mutually_exclusive_group(required=True)
    what.add_argument("--calibration", type=Path, help="calibration folder of that checkpoint")
    what.add_argument("--remove", nargs="+", metavar="MODULE=1,2,5", help="layers to remove, 0-based; no calibration")
    prune.add_argument("--output", type=Path, help="checkpoint folder to write; not needed with --dry-run")
    prune.add_argument(
        "--budget", nargs="+", metavar="MODULE=K", help="layers to remove from a module (default: the paper's share)"
    )
    prune.add_argument("--threshold", type=float, help="least score of a layer that may go")
    prune.add_argument("--criterion", help="cka, mse, cosine, random or keep-first (default: cka)")
    prune.add_argument("--seed", type=_seed, default=0, help="seed of the criterion random (default: %(default)s)")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    prune.set_defaults(usage=prune.error)

    inspect = _command(commands, "inspect", _inspect, "show a checkpoint's modules or a calibration's scores")
    inspect.add_argument("path", type=Path, metavar="CHECKPOINT|CALIBRATION")

    bench = _command(commands, "benchmark", _benchmark, "measure checkpoints side by side")
    bench.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="the first is the base")
    bench.add_argument("--runs", type=int, default=10, help="timed runs of each (default: %(default)s)")
    bench.add_argument("--warmup", type=int, default=2, help="runs of each before those (default: %(default)s)")
    bench.add_argument("--no-train-step", dest="train_step", action="store_false", help="do not time a training step")
    bench.add_argument("--no-run", dest="run_them", action="store_false", help="only what takes no memory for weights")
    bench.add_argument("--alone", action="store_true", help="hold only one of them in memory at a time")
    bench.add_argument("--dtype", default="auto", help="auto (as lerobot loads it) or float32")
    bench.add_argument("--compile", action="store_true", help="compile the denoising step (on CUDA: CUDA graphs)")
    bench.add_argument("--markdown", action="store_true", help="print a Markdown table as papers have it")
    _device(bench)

    make = _command(commands, "make-checkpoint", _make_checkpoint, "make a checkpoint with random weights, offline")
    make.add_argument("--family", required=True, help="e.g. smolvla")
    make.add_argument("--size", required=True, choices=("tiny", "full"), help="tiny for tests, full for measurements")
    make.add_argument("--output", required=True, type=Path, help="checkpoint folder to write")
    make.add_argument("--seed", type=_seed, default=0, help="seed of the weights (default: %(default)s)")
    make.add_argument("--embodiment", help="whose cameras and joints it takes (default: LIBERO's, as in the paper)")

    check = _command(commands, "verify", _verify, "load a checkpoint strictly with stock lerobot and run it")
    check.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    _device(check, "cpu")
    check.add_argument("--compile", action="store_true", help="also compile it, and compare its actions")

    simulate = _command(commands, "simulate", _simulate, "run a simulated robot behind the topics of the real one")
    simulate.add_argument(
        "--embodiment", required=True, help="ur5, ur10e, aloha_single, aloha_bimanual, or a .yaml file"
    )
    simulate.add_argument("--tf-prefix", default="", help="put before the name of every joint")
    simulate.add_argument("--seed", type=_seed, default=0, help="of where the cube lies (default: %(default)s)")
    simulate.add_argument(
        "--rate", type=float, default=1.0, help="speed; any but 1 implies --clock (default: %(default)s)"
    )
    simulate.add_argument("--clock", action="store_true", help="let time begin at 1 s, and publish /clock")
    simulate.add_argument("--camera-rate", type=float, default=20.0, help="pictures a second (default: %(default)s)")
    simulate.add_argument(
        "--pictures", choices=("render", "plain"), default="render", help="plain: grey, where nothing can be drawn"
    )

    record = _command(commands, "record", _record, "record demonstrations of a simulated robot, without ROS")
    record.add_argument("--embodiment", required=True, help="ur5, ur10e, aloha_single, aloha_bimanual, or a .yaml file")
    record.add_argument(
        "--episodes", type=_at_least_one, help="how many, a bag each in the output folder; without it, one: the output"
    )
    record.add_argument("--output", type=Path, help="folder to write (default: recorded_ and the robot's name)")
    record.add_argument("--seed", type=_seed, default=0, help="draws starts and delays (default: %(default)s)")
    record.add_argument("--camera-rate", type=_rate, default=30.0, help="pictures a second (default: %(default)s)")
    record.add_argument(
        "--joint-state-rate", type=_rate, default=100.0, help="joint states a second (default: %(default)s)"
    )
    record.add_argument("--size", type=_size, metavar="WxH", help="of the pictures (default: the embodiment's)")
    record.add_argument("--quality", type=_quality, default=80, help="of the JPEGs, 1 to 100 (default: %(default)s)")

    demo = _command(commands, "demo", _demo, "all of the above on the recorded demonstration")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    for command in (calibrate, prune, make, record, demo):
        command.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    for command in (calibrate, prune, inspect, bench, make, check, record):
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


def _device(command: argparse.ArgumentParser, default: str = "auto") -> None:
    command.add_argument("--device", default=default, help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _seed(text: str) -> int:
    """A seed: what numpy takes, and torch, whose own ends at 64 bits."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^64 - 1")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _quality(text: str) -> int:
    if (quality := _at_least_one(text)) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return quality


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 1 <= rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate from 1 to 1000 Hz")
    return rate


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not all(one.isdecimal() and 16 <= int(one) <= 4096 for one in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size as 320x240, of 16 to 4096 pixels each way")
    return int(width), int(height)


def _say(text: str) -> None:
    # Not through rich, which would break paths over lines and take brackets in them for its own.
    print(text)  # noqa: T201


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _print_json(document: Any) -> None:
    print(json.dumps(document, allow_nan=False))  # noqa: T201


def _print_plan(plan: Any) -> None:
    from clp_ros.report.tables import layers_table

    console = _console()
    for group in plan.groups:
        console.print(
            layers_table(
                " + ".join(group.modules),
                group.scores,
                blocks=group.blocks,
                removed=group.removed,
                threshold=group.threshold,
            )
        )
    _print_notes(plan)


def _print_notes(plan: Any) -> None:
    for note in plan.notes:
        _say(f"note: {note}")


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextmanager
def _progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal, fed with (done, total)."""
    from tqdm import tqdm

    from clp_ros.pruning import processes

    hidden = True if processes.rank() > 0 else None  # None: where it is no terminal
    with tqdm(desc=title, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line on stderr, where that is a terminal, that says what is being done."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield status.update


if __name__ == "__main__":
    sys.exit(main())
