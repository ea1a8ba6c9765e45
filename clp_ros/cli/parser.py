# SPDX-License-Identifier: Apache-2.0
"""The options of the ``clp`` command, and their valid values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clp_ros import __version__
from clp_ros.cli import commands as run

_CHECKPOINT = "checkpoint folder, or a repository on the hub as owner/name or owner/name@revision"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. Call ``options.call(options)`` with its result.

    Options have the names of the fields of the job's request.
    """
    parser = argparse.ArgumentParser(
        prog="clp", description="Prunes the redundant layers of vision-language-action policies, and runs them."
    )
    parser.add_argument("--version", action="version", version=f"clp {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    calibrate = _command(commands, "calibrate", run.calibrate, "replay bags through a policy and compare its layers")
    calibrate.add_argument("--checkpoint", required=True, type=Path, help=_CHECKPOINT)
    calibrate.add_argument(
        "--bag",
        dest="bags",
        metavar="BAG",
        required=True,
        nargs="+",
        type=Path,
        help="rosbag2 recordings, one episode each",
    )
    calibrate.add_argument("--embodiment", required=True, help="name under config/embodiments, or a .yaml file")
    calibrate.add_argument(
        "--task",
        help="name under config/tasks, a .yaml file, or the instruction (default: in episodes.csv beside each bag)",
    )
    calibrate.add_argument("--output", required=True, type=Path, help="calibration folder to write")
    calibrate.add_argument("--samples", type=int, default=64, help="number of frames (default: %(default)s)")
    calibrate.add_argument(
        "--seed", type=_seed, default=0, help="seed of frames, noise and time (default: %(default)s)"
    )
    calibrate.add_argument(
        "--statistics",
        metavar="DATASET|bags",
        help="normalise by a LeRobotDataset's statistics, or by those of the bags (default: the checkpoint's)",
    )
    _device(calibrate)
    calibrate.add_argument("--dtype", default="auto", help="auto (as lerobot loads it) or float32")

    prune = _command(commands, "prune", run.prune, "write a checkpoint without its redundant layers")
    prune.add_argument("--checkpoint", required=True, type=Path, help=_CHECKPOINT)
    what = prune.add_mutually_exclusive_group(required=True)
    what.add_argument("--calibration", type=Path, help="calibration folder of that checkpoint")
    what.add_argument(
        "--remove", nargs="+", metavar="MODULE=1,2,5", help="0-based layers to remove, without a calibration"
    )
    prune.add_argument("--output", type=Path, help="checkpoint folder to write; not needed with --dry-run")
    prune.add_argument(
        "--budget",
        nargs="+",
        metavar="MODULE=K",
        help="number of layers to remove from a module (default: the paper's share)",
    )
    prune.add_argument("--threshold", type=float, help="minimum score of a layer to remove")
    prune.add_argument("--criterion", help="cka, mse, cosine, random or keep-first (default: cka)")
    prune.add_argument("--seed", type=_seed, default=0, help="seed of the criterion random (default: %(default)s)")
    prune.add_argument("--dry-run", action="store_true", help="print the layers to remove, and write nothing")
    prune.set_defaults(usage=prune.error)

    inspect = _command(commands, "inspect", run.inspect, "show a checkpoint's layer stacks or a calibration's scores")
    inspect.add_argument("path", type=Path, metavar="CHECKPOINT|CALIBRATION")

    finetune = _command(
        commands, "finetune", run.finetune, "fine-tune a checkpoint on a LeRobotDataset, through lerobot"
    )
    finetune.add_argument("--checkpoint", required=True, type=Path, help=_CHECKPOINT)
    finetune.add_argument("--dataset", required=True, type=Path, help="folder of a LeRobotDataset (version 3)")
    finetune.add_argument("--output", required=True, type=Path, help="checkpoint folder to write")
    finetune.add_argument("--steps", type=_at_least_one, default=20_000, help="training steps (default: %(default)s)")
    finetune.add_argument(
        "--batch-size", type=_at_least_one, default=8, help="frames in a batch of each process (default: %(default)s)"
    )
    finetune.add_argument(
        "--train",
        default="default",
        metavar="WHAT",
        help="default (as config.json says), all, expert, last=K (the last K layers of each stack and the output "
        "projections) or lora=R",
    )
    finetune.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with lora: add the adapter to the weights, or write the adapter alone (default: %(default)s)",
    )
    finetune.add_argument("--episodes", type=_at_least_one, metavar="N", help="use the first N episodes (default: all)")
    finetune.add_argument(
        "--held-out",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of the episodes of each task on which the loss is only measured (default: %(default)s)",
    )
    finetune.add_argument(
        "--held-out-every", type=_at_least_one, metavar="N", help="steps between these measurements (default: a tenth)"
    )
    finetune.add_argument("--learning-rate", type=float, help="highest learning rate (default: the checkpoint's)")
    finetune.add_argument(
        "--save-every",
        type=_count,
        metavar="N",
        help="steps between the points from which a killed run is resumed; 0: none (default: a tenth)",
    )
    finetune.add_argument(
        "--keep-checkpoints", action="store_true", help="keep these points, in a folder beside the output"
    )
    finetune.add_argument(
        "--workers", type=_count, metavar="N", help="processes that load frames (default: 4, but fewer than the cores)"
    )
    finetune.add_argument(
        "--seed", type=_seed, default=1000, help="seed of the frames' order, noise and time (default: %(default)s)"
    )
    _device(finetune)
    finetune.add_argument(
        "--resume", action="store_true", help="take up an unfinished run with this output, after its newest checkpoint"
    )
    finetune.add_argument(
        "options", nargs="*", metavar="-- OPTION", help="options of lerobot-train, such as --optimizer.lr=1e-4"
    )

    head = _command(commands, "head", run.extract_head, "what a fine-tuning changed, apart from its base and back")
    parts = head.add_subparsers(title="commands", required=True, metavar="COMMAND")
    extract = _command(
        parts, "extract", run.extract_head, "write what differs between a base and a fine-tuned checkpoint"
    )
    extract.add_argument("--base", required=True, type=Path, help="checkpoint from which the fine-tuning started")
    extract.add_argument("--finetuned", required=True, type=Path, help="fine-tuned checkpoint")
    extract.add_argument("--output", required=True, type=Path, help="head folder to write")
    apply = _command(
        parts, "apply", run.apply_head, "write the fine-tuned checkpoint again, from its base and its head"
    )
    apply.add_argument("--base", required=True, type=Path, help="checkpoint from which the fine-tuning started")
    apply.add_argument("--head", required=True, type=Path, help="head folder")
    apply.add_argument("--output", required=True, type=Path, help="checkpoint folder to write")

    bench = _command(commands, "benchmark", run.benchmark, "measure checkpoints side by side")
    bench.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoints; the others are compared with the first",
    )
    bench.add_argument("--runs", type=int, default=10, help="timed runs of each checkpoint (default: %(default)s)")
    bench.add_argument(
        "--warmup", type=int, default=2, help="untimed runs of each checkpoint before these (default: %(default)s)"
    )
    bench.add_argument("--no-train-step", dest="train_step", action="store_false", help="do not time a training step")
    bench.add_argument("--no-run", dest="run", action="store_false", help="only count parameters and FLOPs")
    bench.add_argument("--alone", action="store_true", help="keep only one checkpoint in memory at a time")
    bench.add_argument("--dtype", default="auto", help="auto (as lerobot loads it) or float32")
    bench.add_argument(
        "--compile", dest="compiled", action="store_true", help="compile the denoising step (on CUDA: CUDA graphs)"
    )
    bench.add_argument("--markdown", action="store_true", help="print a Markdown table, as in papers")
    _device(bench)

    make = _command(commands, "make-checkpoint", run.make_checkpoint, "make a checkpoint with random weights, offline")
    make.add_argument("--family", required=True, help="name of the policy family")
    make.add_argument(
        "--size",
        required=True,
        choices=("tiny", "small", "full"),
        help="tiny for tests, full for measurements, small to be trained on a CPU",
    )
    make.add_argument("--output", required=True, type=Path, help="checkpoint folder to write")
    make.add_argument("--seed", type=_seed, default=0, help="seed of the weights (default: %(default)s)")
    make.add_argument("--embodiment", help="robot for cameras and joints (default: LIBERO's, as in the paper)")

    check = _command(commands, "verify", run.verify, "load a checkpoint strictly with stock lerobot and run it")
    check.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    _device(check, "cpu")
    check.add_argument(
        "--compile", dest="compiled", action="store_true", help="also compile the policy and compare its actions"
    )

    simulate = _command(commands, "simulate", run.simulate, "run a simulated robot behind the topics of the real one")
    simulate.add_argument(
        "--embodiment", required=True, help="ur5, ur10e, aloha_single, aloha_bimanual, or a .yaml file"
    )
    simulate.add_argument("--tf-prefix", default="", help="prefix for the name of every joint")
    simulate.add_argument("--task", default="", help="simulated task (default: a cube on the table)")
    simulate.add_argument("--seed", type=_seed, default=0, help="seed of the start (default: %(default)s)")
    simulate.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="speed relative to real time; values other than 1 imply --clock (default: %(default)s)",
    )
    simulate.add_argument("--clock", action="store_true", help="start the time at 1 s, and publish /clock")
    simulate.add_argument("--camera-rate", type=float, default=20.0, help="images per second (default: %(default)s)")
    simulate.add_argument(
        "--pictures",
        choices=("render", "plain"),
        default="render",
        help="plain: grey images, for machines that cannot render",
    )

    record = _command(commands, "record", run.record, "record demonstrations of a simulated robot, without ROS")
    record.add_argument(
        "--embodiment",
        "--robot",
        required=True,
        help="ur5, ur10e, aloha_single, aloha_bimanual, or a .yaml file",
    )
    record.add_argument("--task", help="a simulated task, such as pick_and_lift (default: the robot's demonstration)")
    record.add_argument("--speed", type=_speed, help="with --task: factor on the expert's speed (default: 1)")
    record.add_argument(
        "--perturb", type=_push, metavar="M", help="with --task: push the tool off its way, by up to M metres"
    )
    record.add_argument(
        "--episodes",
        type=_at_least_one,
        help="number of episodes, one bag each in the output folder (default: one, which is the output folder itself "
        "unless --task is given)",
    )
    record.add_argument("--output", type=Path, help="folder to write (default: recorded_ and the robot's name)")
    record.add_argument("--seed", type=_seed, default=0, help="seed of starts and delays (default: %(default)s)")
    record.add_argument("--camera-rate", type=_rate, default=30.0, help="images per second (default: %(default)s)")
    record.add_argument(
        "--joint-state-rate", type=_rate, default=100.0, help="joint states per second (default: %(default)s)"
    )
    record.add_argument("--size", type=_size, metavar="WxH", help="size of the images (default: the embodiment's)")
    record.add_argument("--quality", type=_quality, default=80, help="JPEG quality, 1 to 100 (default: %(default)s)")

    evaluate = _command(commands, "evaluate", run.evaluate, "measure the success of checkpoints in closed loop")
    evaluate.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoints; an earlier evaluation's folder is compared without playing it again",
    )
    evaluate.add_argument("--embodiment", "--robot", help="ur5, ur10e, aloha_single, aloha_bimanual, or a .yaml file")
    evaluate.add_argument(
        "--task", dest="tasks", metavar="TASK", nargs="+", default=(), help="simulated tasks, or all of the robot's"
    )
    evaluate.add_argument(
        "--env", metavar="TYPE:TASK", help="an environment of LeRobot in their place, such as libero:libero_spatial"
    )
    evaluate.add_argument(
        "--env-option", nargs="+", default=(), metavar="NAME=VALUE", help="with --env: options of the environment"
    )
    evaluate.add_argument(
        "--episodes", type=_at_least_one, default=50, help="episodes of each task (default: %(default)s)"
    )
    evaluate.add_argument("--seed", type=_seed, default=0, help="seed of the first start (default: %(default)s)")
    evaluate.add_argument(
        "--latency",
        type=_milliseconds,
        metavar="MS",
        help="time from an observation until its chunk is sent (default: measured for each checkpoint)",
    )
    evaluate.add_argument(
        "--mode", choices=("replace", "ensemble", "rtc"), help="as the policy node's parameter (default: replace)"
    )
    evaluate.add_argument(
        "--replan-steps",
        type=_count,
        metavar="N",
        help="control steps that are executed of each chunk; 0: as few as possible (default: 10; --env: the policy's)",
    )
    evaluate.add_argument("--size", type=_size, metavar="WxH", help="size of the images (default: the checkpoint's)")
    evaluate.add_argument(
        "--workers", type=_count, metavar="N", help="number of processes; 0: in this one (default: one a core)"
    )
    evaluate.add_argument(
        "--batch", type=_at_least_one, metavar="N", help="episodes that a process plays together (default: 10)"
    )
    evaluate.add_argument("--output", type=Path, help="folder for outcomes and pictures; continued if it is there")
    _device(evaluate)
    _convert(commands)
    evaluate.set_defaults(usage=evaluate.error)

    demo = _command(commands, "demo", _demo, "run all steps on the recorded demonstration")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    for command in (calibrate, finetune, bench, make, check, demo):
        _threads(command)
    for command in (calibrate, prune, finetune, extract, apply, make, record, evaluate, demo):
        command.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    for command in (calibrate, prune, finetune, extract, apply, inspect, bench, make, check, record, evaluate):
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _convert(commands: Any) -> None:
    convert = _command(commands, "convert", run.convert, "convert bags into a LeRobotDataset")
    convert.add_argument(
        "--bag",
        dest="bags",
        metavar="BAG",
        nargs="+",
        type=Path,
        default=(),
        help="rosbag2 recordings, or folders of them",
    )
    convert.add_argument("--embodiment", help="name under config/embodiments, or a .yaml file")
    convert.add_argument(
        "--task",
        help="name under config/tasks, a .yaml file, or the instruction; topic:NAME (std_msgs/String); FILE.csv or "
        "FILE.csv:COLUMN (default: the instruction in the file episodes.csv beside the bag)",
    )
    convert.add_argument(
        "--episodes-by",
        default="bag",
        metavar="HOW",
        help="bag (one episode each), topic:NAME (std_msgs/String or Bool), silence:SECONDS, times:S1,S2,... or "
        "times:FILE.csv (default: %(default)s)",
    )
    convert.add_argument("--output", required=True, type=Path, help="the dataset's folder; missing bags are added")
    convert.add_argument("--action", choices=("next_state", "topics"), help="(default: as the embodiment says)")
    convert.add_argument("--fps", type=_at_least_one, help="frames per second (default: the control rate)")
    convert.add_argument("--images", choices=("video", "png"), default="video", help="(default: %(default)s)")
    convert.add_argument("--resize", type=_size, metavar="WxH", help="size of the pictures (default: as recorded)")
    convert.add_argument("--stamps", action="store_true", help="store the original stamps too")
    convert.add_argument(
        "--encoder",
        nargs="+",
        metavar="OPTION=VALUE",
        help="LeRobot's video encoder settings, as vcodec=h264 crf=23 g=2 (default: LeRobot's)",
    )
    convert.add_argument(
        "--shard", type=_shard, metavar="I/N", help="convert the I-th of N shares of the bags, from 0; then use --merge"
    )
    convert.add_argument(
        "--merge",
        nargs="*",
        type=Path,
        metavar="DATASET",
        help="merge converted datasets into the output (default: the shards of the output)",
    )
    convert.add_argument(
        "--resume", action="store_true", help="add what is missing to the output, which is the default too"
    )
    convert.set_defaults(usage=convert.error)
    convert.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    convert.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _command(
    commands: Any, name: str, call: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(call=call, name=name)
    return command


def _threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads", type=_at_least_one, default=0, help="PyTorch's threads on the CPU (default: PyTorch's choice)"
    )


def _device(command: argparse.ArgumentParser, default: str = "auto") -> None:
    command.add_argument("--device", default=default, help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def _seed(text: str) -> int:
    """Returns a seed in the range of NumPy and PyTorch (64 bits)."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^64 - 1")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _milliseconds(text: str) -> float:
    return _number(text, 0.0, 1000.0, "a time from 0 to 1000 ms")


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


def _speed(text: str) -> float:
    return _number(text, 0.2, 3.0, "a speed from 0.2 to 3")


def _share(text: str) -> float:
    return _number(text, 0.0, 0.9, "a share from 0 to 0.9")


def _push(text: str) -> float:
    return _number(text, 0.0, 0.1, "a distance from 0 to 0.1 m")


def _number(text: str, lowest: float, highest: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not lowest <= number <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard as 0/4, 1/4, 2/4 or 3/4")
    return int(index), int(count)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not all(one.isdecimal() and 16 <= int(one) <= 4096 for one in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size as 320x240, of 16 to 4096 pixels each way")
    return int(width), int(height)


def _demo(options: argparse.Namespace) -> None:
    from clp_ros.cli.demo import run_demo  # imported here, because it imports every job

    run_demo(options.output, options.overwrite)
