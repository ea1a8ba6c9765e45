# SPDX-License-Identifier: Apache-2.0
"""The policy node under a real camera load: three 640x480 JPEG cameras at 30 Hz (8 MB/s), two arms at 100 Hz.

    python benchmarks/camera_load.py [--seconds 60]

Four processes over real DDS: cameras, joint states, the node with a trivial policy, and a receiver in the controllers'
place. Every picture carries its number as black and white blocks; the policy reads the three numbers out of the pixels
it is given and sends them as joint positions. So what is compared are the stamps of the frames that were really used
with the time at which the policy got them, and the time at which the trajectory made of them was received.

Two runs: all cameras at the same moment, and a third of a period apart. The node makes a chunk of every new set of
frames (replan_steps 0), which is its hardest case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

RATE_HZ, JOINT_RATE_HZ = 30.0, 100.0
PERIOD_MS = 1e3 / RATE_HZ
JPEG_BYTES = 90_000
BLOCK, BITS = 16, 16
# So many pictures are encoded; then they repeat. No frame is used three seconds late, so its number tells which it is.
CYCLE = 90
STEP = 1e-4  # rad a frame number, well inside the joints' limits
GOAL_MS = 30.0
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
# A frame's number per camera goes to the first three joints of the left arm.
WARM_UP_S = 3.0


def main() -> int:
    """Runs both phases and prints them; returns 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each run")
    args = parser.parse_args()
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    print(
        f"{len(CAMERAS)} cameras 640x480 JPEG at {RATE_HZ:g} Hz, joint states 2 x {JOINT_RATE_HZ:g} Hz, "
        f"{os.cpu_count()} cores"
    )
    reached = [
        run(name, phases, args.seconds) for name, phases in (("together", (0, 0, 0)), ("apart", (0, 1 / 3, 2 / 3)))
    ]
    return 0 if all(reached) else 1


def run(name: str, phases: tuple[float, ...], seconds: float) -> bool:
    """One run of all processes; prints its figures and returns whether the goals are reached."""
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=target, args=(folder, end, *more))
            for target, *more in ((cameras, phases), (joint_states,), (receiver,), (node,))
        ]
        for process in processes:
            process.start()
        load = []
        deadline = time.monotonic() + seconds + WARM_UP_S
        try:
            while time.monotonic() < deadline and all(process.is_alive() for process in processes):
                time.sleep(1)
                load.append(os.getloadavg()[0])
        finally:
            end.set()
            for process in processes:
                process.join(30)
                if process.is_alive():
                    process.kill()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a process of the benchmark failed")
        return report(name, Path(folder), float(np.mean(load)))


def report(name: str, folder: Path, load: float) -> bool:
    """Joins what the processes wrote, by frame number, and prints it."""
    sent = np.load(folder / "cameras.npy")  # (frames, cameras) stamps
    used = np.load(folder / "node.npy")  # (chunks, cameras + 1): frame numbers, when the policy got them
    received = np.load(folder / "receiver.npy")  # (chunks, cameras + 1): frame numbers, when it was received
    statistics = json.loads((folder / "node.json").read_text())
    began = used[0, -1] + WARM_UP_S * 1e9
    used, received = used[used[:, -1] > began], received[received[:, -1] > began]
    frames, stamps = frames_of(used, sent)
    ages = (used[:, -1:] - stamps) / 1e6
    arrival = (received[:, -1] - frames_of(received, sent)[1].max(axis=1)) / 1e6
    print(f"\ncameras {name} (load average {load:.1f})")
    print(f"  chunks sent: {len(used)} in {(used[-1, -1] - used[0, -1]) / 1e9:.0f} s, received: {len(received)}")
    print(f"  {'input':<40} {'frames used':>11} {'largest age when selected':>26} {'when the policy has it':>23}")
    oldest = []
    for column, camera in enumerate(CAMERAS):
        topic, selected = next((k, v) for k, v in statistics.items() if k.startswith(f"age /{camera}/"))
        share = len(np.unique(frames[:, column])) / (frames[-1, column] - frames[0, column] + 1)
        oldest.append(selected["maximum"] / PERIOD_MS)
        print(
            f"  {topic.removeprefix('age '):<40} {share:>10.1%} {oldest[-1]:>18.2f} periods"
            f" {ages[:, column].max() / PERIOD_MS:>15.2f} periods"
        )
    for key, its in statistics.items():
        if "joint_states" in key:
            print(f"  {key.removeprefix('age '):<40} {'':>11} {its['maximum'] * JOINT_RATE_HZ / 1e3:>18.2f} periods")
    print(f"  {'ms':<52} {'p50':>7} {'p99':>7} {'max':>7}")
    rows = {"newest image to published (the node's own figure)": statistics["image to trajectory"]}
    rows |= {f"  of which {stage}": statistics[stage] for stage in ("decode", "inference", "send")}
    rows["newest image to received by a controller"] = {
        "p50": np.percentile(arrival, 50),
        "p99": np.percentile(arrival, 99),
        "maximum": arrival.max(),
    }
    for what, its in rows.items():
        print(f"  {what:<52} {its['p50']:>7.1f} {its['p99']:>7.1f} {its['maximum']:>7.1f}")
    fresh, quick = max(oldest) <= 1, np.percentile(arrival, 99) <= GOAL_MS
    print(
        f"  no frame older than one period: {'yes' if fresh else 'NO'}; "
        f"p99 <= {GOAL_MS:g} ms: {'yes' if quick else 'NO'}"
    )
    return fresh and bool(quick)


def frames_of(chunks: np.ndarray, sent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which frames were used, and their stamps, both (chunks, cameras): of those with that number, the latest sent."""
    latest = np.stack([np.searchsorted(stamps, chunks[:, -1], side="right") - 1 for stamps in sent.T], axis=1)
    frames = latest - (latest - chunks[:, :-1]) % CYCLE
    return frames, np.take_along_axis(sent, frames, axis=0)


def noisy_picture(rng: np.random.Generator) -> np.ndarray:
    """A picture whose JPEG has JPEG_BYTES, as a cluttered scene's: noise on blurred noise."""
    import cv2

    scene = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), np.uint8), (0, 0), 6).astype(np.int16)
    scene = (scene - 128) * 8 + 128 + rng.normal(0, 14, scene.shape)
    return np.clip(scene, 0, 255).astype(np.uint8)


def encoded(picture: np.ndarray, number: int, quality: int) -> bytes:
    """The picture with a number in its top row, as a JPEG."""
    import cv2

    for bit in range(BITS):
        picture[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def number_of(picture: np.ndarray) -> int:
    """The number in a decoded picture's top row."""
    middle = picture[BLOCK // 2, BLOCK // 2 : BITS * BLOCK : BLOCK, 0]
    return int(sum(1 << bit for bit in range(BITS) if middle[bit] > 127))


def stamp(message: Any, now: int) -> None:
    """Sets a header's stamp to a time in nanoseconds."""
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(now, 10**9)


def cameras(folder: str, end: Any, phases: tuple[float, ...]) -> None:
    """Publishes the cameras; the pictures are encoded beforehand, as real cameras do that outside this machine."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage

    picture = noisy_picture(np.random.default_rng(0))
    quality = next(q for q in range(95, 5, -1) if len(encoded(picture, 0, q)) <= JPEG_BYTES)
    jpegs = [encoded(picture, number, quality) for number in range(CYCLE)]
    rclpy.init()
    publisher_node = rclpy.create_node("cameras")
    publishers = [
        publisher_node.create_publisher(
            CompressedImage, f"/{camera}/color/image_rect_raw/compressed", qos_profile_sensor_data
        )
        for camera in CAMERAS
    ]
    stamps: list[list[int]] = [[] for _ in CAMERAS]
    began = time.monotonic()
    messages = [CompressedImage(format="jpeg") for _ in range(CYCLE)]
    for message, jpeg in zip(messages, jpegs, strict=True):
        message.data.frombytes(jpeg)
    while not end.is_set():
        number = len(stamps[0])
        for camera, phase in enumerate(phases):
            pause = began + (number + phase) / RATE_HZ - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            now = time.time_ns()
            message = messages[number % CYCLE]
            stamp(message, now)
            publishers[camera].publish(message)
            stamps[camera].append(now)
    np.save(Path(folder, "cameras.npy"), np.array(stamps).T)
    rclpy.shutdown()


def joint_states(folder: str, end: Any) -> None:
    """Publishes both arms' joint states."""
    import rclpy
    from sensor_msgs.msg import JointState

    from clp_ros.robots.embodiment import load_embodiment

    embodiment = load_embodiment("aloha_bimanual")
    rclpy.init()
    publisher_node = rclpy.create_node("joint_states")
    names = [joint.name for joint in embodiment.joints[:7]]
    publishers = [publisher_node.create_publisher(JointState, s.topic, 10) for s in embodiment.joint_states.values()]
    message = JointState(name=names, position=[0.0] * 6 + [0.03])
    began, sent = time.monotonic(), 0
    while not end.is_set():
        pause = began + sent / JOINT_RATE_HZ - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        stamp(message, time.time_ns())
        for publisher in publishers:
            publisher.publish(message)
        sent += 1
    rclpy.shutdown()


def receiver(folder: str, end: Any) -> None:
    """Receives the left arm's trajectories and notes when."""
    import rclpy
    from trajectory_msgs.msg import JointTrajectory

    heard: list[tuple[int, ...]] = []
    times: list[int] = []

    def hear(message: JointTrajectory) -> None:
        times.append(time.time_ns())
        heard.append(tuple(round(position / STEP) for position in message.points[0].positions[: len(CAMERAS)]))

    rclpy.init()
    receiving = rclpy.create_node("receiver")
    receiving.create_subscription(JointTrajectory, "/follower_left/arm_controller/joint_trajectory", hear, 1)
    while not end.is_set():
        rclpy.spin_once(receiving, timeout_sec=0.1)
    np.save(Path(folder, "receiver.npy"), np.column_stack([heard, times]))
    rclpy.shutdown()


def node(folder: str, end: Any) -> None:
    """The policy node with a policy that reads the pictures' numbers."""
    from dataclasses import asdict

    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    from clp_ros.nodes.policy import PolicyNode

    used: list[tuple[int, ...]] = []
    times: list[int] = []

    class Reader:
        chunk_size = 50

        def check_features(self, slots: list[str], action_size: int, whose: str) -> None:
            pass

        def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
            times.append(time.time_ns())
            numbers = tuple(number_of(images[f"observation.images.{camera}"]) for camera in CAMERAS)
            used.append(numbers)
            chunk = np.repeat(state[None], self.chunk_size, axis=0)
            chunk[:, : len(CAMERAS)] = np.array(numbers) * STEP
            return chunk

    parameters = {"checkpoint": folder, "embodiment": "aloha_bimanual", "task": "transfer_cube", "replan_steps": 0}
    rclpy.init(args=["--ros-args", *(x for k, v in parameters.items() for x in ("-p", f"{k}:={v}"))])
    policy_node = PolicyNode(lambda *_: Reader())
    executor = SingleThreadedExecutor()  # as the policy node's main() has it
    executor.add_node(policy_node)

    def spin() -> None:
        with suppress(ExternalShutdownException):  # how rclpy.shutdown() ends it
            executor.spin()

    spinning = threading.Thread(target=spin)
    spinning.start()
    policy_node.trigger_configure()
    policy_node.trigger_activate()
    end.wait()
    policy_node.trigger_deactivate()
    runner = policy_node.runner
    statistics = {name: asdict(spread) for name, spread in runner.statistics.spreads().items()}
    Path(folder, "node.json").write_text(json.dumps(statistics))
    np.save(Path(folder, "node.npy"), np.column_stack([used, times]))
    rclpy.shutdown()
    spinning.join()
    policy_node.destroy_node()


if __name__ == "__main__":
    sys.exit(main())
