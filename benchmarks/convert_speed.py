# SPDX-License-Identifier: Apache-2.0
"""How long ``clp convert`` takes for a gigabyte of bags, and how much memory it needs.

    python benchmarks/convert_speed.py [--megabytes 250] [--kinds raw jpeg] [--images video png] [--size 640x480]
    python benchmarks/convert_speed.py --minutes 30 --kinds raw --images video --size 160x120

Makes a bag of one camera at 30 Hz, whose pictures have texture, a moving object and a sensor's noise, and of joint
states at 100 Hz; and converts it at 30 frames per second in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from results import Table, add_output_argument, write_results

from clp_ros.bags.writer import STORE, header, write_bag

CAMERA_HZ, STATES_HZ = 30, 100
EYE, STATES = "/eye", "/joint_states"
TYPES = {"raw": "sensor_msgs/msg/Image", "jpeg": "sensor_msgs/msg/CompressedImage"}
START = 1_700_000_000_000_000_000
GOAL_S = 60.0


class Scene:
    """Pictures as a camera takes them, of which JPEG and video cannot make nothing."""

    def __init__(self, width: int, height: int) -> None:
        rng = np.random.default_rng(0)
        rows = np.full((height, width, 3), 110.0)
        for sigma in (2, 8, 40):
            noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), sigma)
            rows += 22 * noise / noise.std()
        self._background = rows
        self._noise = rng.normal(0, 2.5, (8, height, width, 3))

    def picture(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8, RGB."""
        rows = self._background + self._noise[number % 8]
        height, width = rows.shape[:2]
        side = height // 5
        left = (4 * number) % (width - side)
        rows[height // 3 : height // 3 + side, left : left + side] = (200, 60, 40)
        return rows.clip(0, 255).astype(np.uint8)


def recording(kind: str, scene: Scene, pictures: int, quality: int) -> Iterator[tuple[int, str, Any]]:
    """The messages, in the order of time."""
    empty = np.empty(0)
    times = [(START + number * 10**9 // CAMERA_HZ, EYE, number) for number in range(pictures)]
    times += [(START + n * 10**9 // STATES_HZ, STATES, n) for n in range(pictures * STATES_HZ // CAMERA_HZ)]
    for stamp, topic, number in sorted(times):
        if topic == STATES:
            position = np.sin(number / 50 + np.arange(6))
            names = [f"joint_{index}" for index in range(6)]
            yield stamp, topic, STORE.types["sensor_msgs/msg/JointState"](header(stamp), names, position, empty, empty)
            continue
        rows = scene.picture(number)
        if kind == "raw":
            height, width = rows.shape[:2]
            message = STORE.types[TYPES[kind]](header(stamp), height, width, "rgb8", 0, 3 * width, rows.reshape(-1))
        else:
            data = cv2.imencode(".jpg", rows[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].reshape(-1)
            message = STORE.types[TYPES[kind]](header(stamp), "jpeg", data)
        yield stamp, topic, message


def robot(kind: str) -> dict[str, Any]:
    """The embodiment."""
    sync = {"policy": "asof", "tolerance_ms": 100, "stamp": "header"}
    joints = [{"name": f"joint_{n}", "lower": -2, "upper": 2, "velocity": 1.0, "unit": "rad"} for n in range(6)]
    return {
        "name": "benchmark_arm",
        "description": "an arm and a camera",
        "control_rate_hz": float(CAMERA_HZ),
        "cameras": {"eye": {"topic": EYE, "type": TYPES[kind], "feature": "observation.images.eye", "sync": sync}},
        "joint_states": {"arm": {"topic": STATES, "sync": sync}},
        "controllers": {"arm": {"joint_states": "arm", "topic": "/arm/joint_trajectory", "joints": joints}},
    }


def child(bag: str, embodiment: str, output: str, images: str) -> None:
    """Converts, and prints what it took: the conversion alone, without the imports."""
    import lerobot.datasets  # noqa: F401

    import clp_ros.datasets.conversion  # noqa: F401
    from clp_ros.jobs import convert
    from clp_ros.jobs.progress import Progress

    memory: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append(pages * resource.getpagesize())

    watcher = threading.Thread(target=watch)
    request = convert.ConvertRequest(
        bags=(bag,), embodiment=embodiment, output=output, task="move the block", images=images
    )
    watcher.start()
    began, spent = time.monotonic(), time.process_time()
    result = convert.run(request, Progress())
    seconds, processor = time.monotonic() - began, time.process_time() - spent
    done.set()
    watcher.join()
    fault = [one.why for one in result.left_out]
    print(
        json.dumps(
            {"seconds": seconds, "processor": processor, "frames": result.frames, "memory": memory, "fault": fault}
        )
    )


def main() -> int:
    """Prints a Markdown table; returns 1 where a conversion is slower than the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=250, help="size of the bag (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="length of the bag, instead of its size")
    parser.add_argument("--kinds", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--images", nargs="+", choices=("video", "png"), default=["video", "png"])
    parser.add_argument("--size", default="640x480", metavar="WxH", help="of the pictures (default: %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG (default: %(default)s)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    add_output_argument(parser)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return 0
    width, height = (int(part) for part in options.size.split("x"))
    scene = Scene(width, height)
    speed = Table("bag, images", {"size": "GB", "frames": None, "time": "s/GB", "processor": "s/GB", "a frame": "ms"})
    memory = Table("bag, images", {"first tenth": "MB", "middle": "MB", "last tenth": "MB", "most": "MB"})
    slow = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            first = next(data for _, topic, data in recording(kind, scene, 1, options.quality) if topic == EYE)
            pictures = int(options.megabytes * 1e6 / first.data.nbytes)
            if options.minutes:
                pictures = int(options.minutes * 60 * CAMERA_HZ)
            bag = folder / "bag"
            bag.mkdir()
            topics = {EYE: TYPES[kind], STATES: "sensor_msgs/msg/JointState"}
            write_bag(bag, "bag", topics, recording(kind, scene, pictures, options.quality), {})
            (folder / "robot.yaml").write_text(yaml.safe_dump(robot(kind), sort_keys=False))
            gigabytes = sum(path.stat().st_size for path in bag.iterdir()) / 1e9
            for images in options.images:
                arguments = [str(bag), str(folder / "robot.yaml"), str(folder / images), images]
                script = [sys.executable, __file__, "--child", *arguments]
                output = subprocess.run(script, check=True, capture_output=True, text=True, env=os.environ).stdout
                found = json.loads(output.splitlines()[-1])
                if found["fault"] or found["frames"] < pictures - 3:
                    raise SystemExit(f"error: {found['fault'] or found['frames']}")
                row = f"{kind}, {images}"
                speed.rows[row] = {
                    "size": round(gigabytes, 3),
                    "frames": found["frames"],
                    "time": round(found["seconds"] / gigabytes, 1),
                    "processor": round(found["processor"] / gigabytes, 1),
                    "a frame": round(1e3 * found["processor"] / found["frames"], 2),
                }
                samples = np.array(found["memory"]) / 1e6
                tenth = max(1, len(samples) // 10)
                memory.rows[row] = {
                    "first tenth": round(float(samples[:tenth].max())),
                    "middle": round(float(samples[len(samples) // 2])),
                    "last tenth": round(float(samples[-tenth:].max())),
                    "most": round(float(samples.max())),
                }
                for table in (speed, memory):
                    print(f"| {row} | " + " | ".join(map(str, table.rows[row].values())) + " |", flush=True)
                if found["seconds"] / gigabytes > GOAL_S:
                    slow.append(f"{row}: slower than the goal of {GOAL_S:g} s/GB.")
    load = os.getloadavg()[0]
    notes = [f"The machine's load average at the end was {load:.1f}.", *slow]
    write_results(options.output, [speed, memory], notes)
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
