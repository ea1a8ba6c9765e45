#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Records the demonstration `aloha_bimanual`: gym-aloha's cube transfer in MuJoCo, written as a rosbag2 folder.

The right arm picks up the red cube and hands it to the left arm (aloha_transfer.py). The bag has the measured
positions of the simulated joints, not the commands. If the left gripper does not hold the cube at the end, no bag is
written.

Recording needs requirements-simulation.txt and, without a display, EGL (Debian: libegl1 libgl1-mesa-dri). See
README.md.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from aloha_transfer import JOINT_NAMES, SECOND, Scene
from tqdm import tqdm

from clp_ros.bags.writer import STORE, header, write_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder, check_output_folder
from clp_ros.messages.images import JPEG_FORMAT, encode_jpeg
from clp_ros.simulation.recorded_topics import CAMERA_DELAY_MS, EPOCH_NS, JOINT_DELAY_MS

MILLISECOND = SECOND // 1000
JOINT_RATE = 50.0  # Hz; ALOHA's control rate, and gym-aloha's

# The scene's camera, and the time of its first image. Neither cameras nor joints are synchronised with each other.
CAMERAS = {
    "cam_high": ("top", 8 * MILLISECOND),
    "cam_left_wrist": ("left_wrist", 14 * MILLISECOND),
    "cam_right_wrist": ("right_wrist", 22 * MILLISECOND),
}
PICTURE_SIZE = (320, 240)  # ALOHA's cameras have 640x480, which would take twice the space
ARM_PHASES = {"left": 0, "right": 6 * MILLISECOND}


@dataclass
class Source:
    """A topic: when its next message is due, and how the message is made."""

    topic: str
    type: str
    rate: float
    phase_ns: int
    delay_ms: tuple[float, float]
    make: Callable[[Any], Any]  # header -> message
    frame: str
    count: int = 0

    def due_ns(self) -> int:
        """Returns the simulation time of the next message, in nanoseconds."""
        return self.phase_ns + round(self.count * SECOND / self.rate)


def make_sources(scene: Scene, arguments: argparse.Namespace) -> list[Source]:
    """Returns the five topics of the recording."""

    def joint_states(side: str) -> Callable[[Any], Any]:
        def make(header: Any) -> Any:
            position, velocity = scene.arm(side)
            return STORE.types["sensor_msgs/msg/JointState"](header, list(JOINT_NAMES), position, velocity, np.zeros(0))

        return make

    def compressed_image(camera: str) -> Callable[[Any], Any]:
        def make(header: Any) -> Any:
            jpeg = encode_jpeg(scene.picture(camera, *PICTURE_SIZE))
            return STORE.types["sensor_msgs/msg/CompressedImage"](header, JPEG_FORMAT, jpeg)

        return make

    sources = [
        Source(
            topic=f"/follower_{side}/joint_states",
            type="sensor_msgs/msg/JointState",
            rate=JOINT_RATE,
            phase_ns=phase,
            delay_ms=JOINT_DELAY_MS,
            make=joint_states(side),
            frame="",
        )
        for side, phase in ARM_PHASES.items()
    ]
    sources += [
        Source(
            topic=f"/{name}/color/image_rect_raw/compressed",
            type="sensor_msgs/msg/CompressedImage",
            rate=arguments.camera_rate,
            phase_ns=phase,
            delay_ms=CAMERA_DELAY_MS,
            make=compressed_image(camera),
            frame=f"{name}_color_optical_frame",
        )
        for name, (camera, phase) in CAMERAS.items()
    ]
    return sources


def record(arguments: argparse.Namespace) -> dict[str, int]:
    """Simulates the transfer and writes the bag.

    Returns:
        The number of messages by topic.

    Raises:
        ClpError: The output folder is not empty, a package is missing, rendering fails, or the arms lost the cube.
    """
    check_output_folder(arguments.output, arguments.overwrite)
    scene = Scene(arguments.seed)
    sources = make_sources(scene, arguments)
    jitter = np.random.default_rng(arguments.seed)
    arrived: list[tuple[int, str, Any]] = []
    steps = scene.steps(arguments.seconds)
    for now in tqdm(scene.run(steps), total=steps, desc="recording", unit="step"):
        for source in sources:
            if now < source.due_ns():
                continue
            stamp = EPOCH_NS + now
            message = source.make(header(stamp, source.frame))
            receive = stamp + round(jitter.uniform(*source.delay_ms) * MILLISECOND)
            arrived.append((receive, source.topic, message))
            source.count += 1
    if not scene.handed_over():
        raise ClpError(
            "the left arm does not hold the cube at the end",
            where=f"--seed {arguments.seed}",
            hint="take another --seed, or a longer --seconds",
        )

    # A recorder writes in the order of arrival, in which a joint state may precede an image with an earlier stamp.
    arrived.sort(key=lambda entry: entry[0])
    notes = {"made_by": "record_aloha_bimanual.py", "seed": str(arguments.seed)}
    with atomic_folder(arguments.output, arguments.overwrite) as folder:
        write_bag(folder, arguments.output.name, {source.topic: source.type for source in sources}, arrived, notes)
    return {source.topic: source.count for source in sources}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).resolve().parent / "aloha_bimanual"
    parser.add_argument("--output", type=Path, default=default, help="the bag's folder (default: beside this script)")
    parser.add_argument("--overwrite", action="store_true", help="replace the bag that is there")
    parser.add_argument("--seed", type=int, default=0, help="the cube's place and the arrival times (default: 0)")
    parser.add_argument("--seconds", type=float, default=9.0, help="9 to 60 (default: 9, near the joints' top speed)")
    parser.add_argument("--camera-rate", type=float, default=25.0, help="pictures a second a camera, 1 to 50")
    values = parser.parse_args(arguments)
    values.output = values.output.resolve()
    ranges = {"seed": (0, 2**32 - 1), "seconds": (9, 60), "camera_rate": (1, 50)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(values, name) <= high:
            parser.error(f"--{name.replace('_', '-')} is from {low} to {high}")
    return values


def main() -> int:
    """Records, and prints the number of messages."""
    arguments = parse()
    try:
        counts = record(arguments)
    except ClpError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130  # nothing was written yet, or atomic_folder has removed it
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    for topic, count in counts.items():
        sys.stdout.write(f"{count:5d}  {topic}\n")
    sys.stdout.write(f"{size / 1e6:.2f} MB in {arguments.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
