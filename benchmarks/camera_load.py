# SPDX-License-Identifier: Apache-2.0
"""Measures the policy node with three 640x480 cameras at 30 Hz, JPEG (8 MB/s) or raw (83 MB/s), and two arms.

    python benchmarks/camera_load.py [--seconds 60]          CompressedImage
    python benchmarks/camera_load.py --raw --seconds 120     Image, rgb8, with config/dds/fastdds.xml
    python benchmarks/camera_load.py --awake ...             on processors that are kept from sleeping

Four processes communicate over DDS: cameras, joint states at 100 Hz, the node with a trivial policy, and a receiver
instead of the controllers. Each image encodes its number in black and white blocks, and the policy reads the three
numbers from its input. This gives the stamps of the frames that were used, and the time at which the policy received
them. The trajectory's stamp, which is also in the node's log, gives the time from the newest image's stamp to the
reception of the trajectory.

The host of a virtual machine sometimes takes the processors away for some milliseconds. Therefore, the latency is
printed for the whole run, for which the goal applies, and for the quiet half seconds, in which the host took at most
1 % of the processors' time.

Most of this delay occurs when a processor wakes up: an idle processor is returned to the host, and is not always
available again immediately. With --awake, a loop of the lowest priority (SCHED_IDLE) keeps each processor busy. On a
robot's computer, /dev/cpu_dma_latency or idle=poll have this effect.

There are two runs: with all cameras at the same time, and with the cameras a third of a period apart. The node makes a
chunk of every new set of frames (replan_steps 0, mode ensemble), which is the maximum load. The policy predicts the
current position of the arms, with white noise of 5 mrad at each step.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from results import Table, Value, add_output_argument, write_results

from clp_ros.core.resources import resource_path

RATE_HZ, JOINT_RATE_HZ = 30.0, 100.0
PERIOD_MS = 1e3 / RATE_HZ
JPEG_BYTES = 90_000
BLOCK, BITS = 16, 16
# Number of encoded images, which repeat. No frame is used three seconds late, so its number identifies it.
CYCLE = 90
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
WARM_UP_S = 3.0
NOISE = 0.005  # of the policy's chunks, rad
# Maximum growth of the node's memory from the first quarter of a run to the last, MB. One set of frames a minute is
# more.
FLAT_MB = 5.0
# Columns of the results: the smallest share of a camera's frames that was used, the age of the oldest frame when it was
# selected, and the latency without the policy's time.
UNITS = {
    "frames used": None,
    "oldest frame": "periods",
    "p50": "ms",
    "p99": "ms",
    "largest": "ms",
    "memory growth": "MB",
    "taken by the host": None,
}
# Period at which memory and the host's share are read, and the maximum share of the host in a quiet period.
WHILE_S, QUIET = 0.5, 0.01


@dataclass(frozen=True)
class Load:
    """What the cameras send, and the node's goals.

    Attributes:
        raw: Image with rgb8 instead of CompressedImage with JPEG.
        used: Minimum share of the frames that are used.
        goal_ms: Maximum p99 of the time from the newest image's stamp to the reception of its trajectory, without the
            policy's time.
    """

    raw: bool
    used: float
    goal_ms: float

    def embodiment(self, folder: str) -> str:
        """Returns the bimanual ALOHA with these cameras."""
        if not self.raw:
            return "aloha_bimanual"
        text = resource_path("config/embodiments/aloha_bimanual.yaml").read_text(encoding="utf-8")
        text = text.replace("/compressed", "").replace("msg/CompressedImage", "msg/Image")
        path = Path(folder, "aloha_raw.yaml")
        path.write_text(text.replace("name: aloha_bimanual", "name: aloha_raw"), encoding="utf-8")
        return str(path)


JPEG = Load(raw=False, used=0.0, goal_ms=30.0)
RAW = Load(raw=True, used=0.95, goal_ms=20.0)


def main() -> int:
    """Runs both phases and prints them. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each run")
    parser.add_argument("--raw", action="store_true", help="raw images instead of JPEG")
    parser.add_argument("--awake", action="store_true", help="keep the processors from sleeping")
    add_output_argument(parser)
    args = parser.parse_args()
    kind = RAW if args.raw else JPEG
    if args.raw:
        os.environ["FASTRTPS_DEFAULT_PROFILES_FILE"] = str(resource_path("config/dds/fastdds.xml"))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    print(
        f"{len(CAMERAS)} cameras 640x480 {'rgb8' if args.raw else 'JPEG'} at {RATE_HZ:g} Hz, "
        f"joint states 2 x {JOINT_RATE_HZ:g} Hz, {os.cpu_count()} cores" + ", kept awake" * args.awake
    )
    record = Table("cameras", dict(UNITS))
    with kept_awake() if args.awake else nullcontext():
        reached = [
            run(name, phases, args.seconds, kind, record.rows.setdefault(name, {}))
            for name, phases in (("together", (0, 0, 0)), ("apart", (0, 1 / 3, 2 / 3)))
        ]
    write_results(args.output, [record])
    return 0 if all(reached) else 1


@contextmanager
def kept_awake() -> Iterator[None]:
    """Keeps all processors busy in the block."""
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=idle_loop, args=(cpu,), daemon=True) for cpu in os.sched_getaffinity(0)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def idle_loop(cpu: int) -> None:
    """Keeps one processor busy at the lowest priority. Its time counts as that of a process with a nice value."""
    os.sched_setaffinity(0, {cpu})
    os.nice(19)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while True:
        pass


@contextmanager
def running(processes: Sequence[SpawnProcess], end: Event) -> Iterator[None]:
    """Starts processes, and sets ``end`` after the block. Raises an error if one of them failed."""
    for process in processes:
        process.start()
    try:
        yield
    finally:
        end.set()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the benchmark failed, or the node gave up: see above")


def run(name: str, phases: tuple[float, ...], seconds: float, kind: Load, record: dict[str, Value]) -> bool:
    """One run of all processes, printed and added to the record; returns whether the goals are reached."""
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=target, args=(folder, end, *more))
            for target, *more in ((cameras, phases, kind), (joint_states,), (receiver,), (node, kind))
        ]
        load, memory = [], []
        with running(processes, end):
            before = cpu_ticks()
            ticks = [(time.time_ns(), before)]
            deadline = time.monotonic() + seconds + WARM_UP_S
            while time.monotonic() < deadline and all(process.is_alive() for process in processes):
                time.sleep(WHILE_S)
                ticks.append((time.time_ns(), cpu_ticks()))
                load.append(os.getloadavg()[0])
                memory.append(anonymous_mb(processes[-1].pid))
        spent = cpu_ticks() - before
        busy = f"load average {np.mean(load):.1f}, CPUs {1 - (spent[1] + spent[3]) / spent.sum():.0%} busy, "
        busy += f"{spent[7] / spent.sum():.1%} taken by the host"
        record["taken by the host"] = f"{spent[7] / spent.sum():.1%}"
        return report(f"{name} ({busy})", Path(folder), np.array(memory), quiet_times(ticks), kind, record)


def cpu_ticks() -> np.ndarray:
    """Returns the time of all CPUs since the start, by state: the second is that of processes with a nice value, the
    fourth is idle, the eighth was taken by a virtual machine's host."""
    return np.array(Path("/proc/stat").read_text(encoding="utf-8").split()[1:9], dtype=np.int64)


def quiet_times(ticks: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Returns begin and end of the quiet periods, (periods, 2) nanoseconds. ``ticks`` are :func:`cpu_ticks` at their
    ends."""
    spent = np.diff([until for _, until in ticks], axis=0)
    ends = np.array([end_ns for end_ns, _ in ticks])
    return np.stack([ends[:-1], ends[1:]], axis=1)[spent[:, 7] <= QUIET * spent.sum(axis=1)]


def anonymous_mb(pid: int) -> float:
    """A process's anonymous memory."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), 0.0)


def report(
    name: str, folder: Path, memory: np.ndarray, quiet: np.ndarray, kind: Load, record: dict[str, Value]
) -> bool:
    """Combines the output of the processes, prints it and adds it to the record."""
    sent = np.load(folder / "cameras.npy")  # (frames, cameras) stamps
    used = np.load(folder / "node.npy")  # (chunks, cameras + 1): frame numbers, when the policy got them
    received = np.load(folder / "receiver.npy")  # (chunks, 2): when trajectories were made, when they were received
    statistics = json.loads((folder / "node.json").read_text())
    began = used[0, -1] + WARM_UP_S * 1e9
    used, received = used[used[:, -1] > began], received[received[:, -1] > began]
    frames, stamps = frames_of(used, sent)
    ages = (used[:, -1:] - stamps) / 1e6
    chunks = logged_chunks(next(folder.glob("policy-*.jsonl")))  # stamp, newest image, ms of inference
    # The log has seconds, exact to less than a microsecond; chunks are milliseconds apart.
    nearest = np.abs(received[:, :1] / 1e9 - chunks[:, 0]).argmin(axis=1)
    matched = np.abs(received[:, 0] / 1e9 - chunks[nearest, 0]) < 1e-5  # the rest are stops
    arrival = ((received[:, 1] / 1e9 - chunks[nearest, 1]) * 1e3)[matched]
    without_policy = arrival - chunks[nearest, 2][matched]
    when = received[matched, 1][:, None]
    undisturbed = without_policy[((quiet[:, 0] <= when) & (when < quiet[:, 1])).any(axis=1)]
    print(f"\ncameras {name}")
    print(f"  chunks sent: {len(used)} in {(used[-1, -1] - used[0, -1]) / 1e9:.0f} s, received: {len(received)}")
    print(f"  {'input':<40} {'frames used':>11} {'largest age when selected':>26} {'when the policy has it':>23}")
    oldest, shares = [], []
    for column, camera in enumerate(CAMERAS):
        topic, selected = next((k, v) for k, v in statistics.items() if k.startswith(f"age /{camera}/"))
        share = len(np.unique(frames[:, column])) / (frames[-1, column] - frames[0, column] + 1)
        oldest.append(selected["maximum"] / PERIOD_MS)
        shares.append(share)
        print(
            f"  {topic.removeprefix('age '):<40} {share:>10.1%} {oldest[-1]:>18.2f} periods"
            f" {ages[:, column].max() / PERIOD_MS:>15.2f} periods"
        )
    for key, its in statistics.items():
        if "joint_states" in key:
            print(f"  {key.removeprefix('age '):<40} {'':>11} {its['maximum'] * JOINT_RATE_HZ / 1e3:>18.2f} periods")
    print(f"  {'ms':<66} {'p50':>7} {'p99':>7} {'max':>7}")
    rows = {"newest image to published (the node's own figure)": statistics["image to trajectory"]}
    rows |= {f"  of which {stage}": statistics[stage] for stage in ("decode", "inference", "send")}
    part = len(undisturbed) / len(without_policy)
    for what, values in (
        ("", arrival),
        (", without the policy's own time", without_policy),
        *([(f", of the {part:.0%} while the host was quiet", undisturbed)] if len(undisturbed) else []),
    ):
        spread = np.percentile(values, (50, 99, 100)).tolist()
        rows[f"newest image to received{what}"] = dict(zip(("p50", "p99", "maximum"), spread, strict=True))
    for what, its in rows.items():
        print(f"  {what:<66} {its['p50']:>7.1f} {its['p99']:>7.1f} {its['maximum']:>7.1f}")
    memory = memory[int(WARM_UP_S / WHILE_S) :]
    quarter = max(1, len(memory) // 4)
    growth = float(np.median(memory[-quarter:]) - np.median(memory[:quarter]))
    print(f"  the node's anonymous memory: {np.median(memory[-quarter:]):.0f} MB, {growth:+.1f} MB over the run")
    p50, p99, largest = np.percentile(without_policy, (50, 99, 100)).tolist()
    record |= {"frames used": f"{min(shares):.1%}", "oldest frame": float(max(oldest))}
    record |= {"p50": p50, "p99": p99, "largest": largest, "memory growth": growth}
    goals = {
        "no frame older than one period": max(oldest) <= 1,
        f"frames used >= {kind.used:.0%}": min(shares) >= kind.used,
        f"p99 without the policy <= {kind.goal_ms:g} ms": np.percentile(without_policy, 99) <= kind.goal_ms,
        f"memory within {FLAT_MB:g} MB": growth <= FLAT_MB,
    }
    print("  " + "; ".join(f"{goal}: {'yes' if reached else 'NO'}" for goal, reached in goals.items()))
    return all(goals.values())


def logged_chunks(path: Path) -> np.ndarray:
    """The chunks in the node's log: (chunks, 3), the trajectories' stamp and the newest image's (s), inference (ms)."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([[e["stamp"], e["newest_image"], e["inference_ms"]] for e in events if e["event"] == "chunk"])


def frames_of(chunks: np.ndarray, sent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the frames that were used, and their stamps, both (chunks, cameras).

    Of several frames with one number, the last one sent before the chunk counts.
    """
    latest = np.stack([np.searchsorted(stamps, chunks[:, -1], side="right") - 1 for stamps in sent.T], axis=1)
    frames = latest - (latest - chunks[:, :-1]) % CYCLE
    return frames, np.take_along_axis(sent, frames, axis=0)


def noisy_picture(rng: np.random.Generator) -> np.ndarray:
    """Returns an image whose JPEG has JPEG_BYTES, as that of a cluttered scene: noise on blurred noise."""
    import cv2

    scene = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), np.uint8), (0, 0), 6).astype(np.int16)
    scene = (scene - 128) * 8 + 128 + rng.normal(0, 14, scene.shape)
    return np.clip(scene, 0, 255).astype(np.uint8)


def numbered(picture: np.ndarray, number: int) -> np.ndarray:
    """The picture with a number in its top row."""
    for bit in range(BITS):
        picture[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 if number >> bit & 1 else 0
    return picture


def encoded(picture: np.ndarray, quality: int) -> bytes:
    """The picture as a JPEG."""
    import cv2

    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def camera_messages(raw: bool) -> list[Any]:
    """A message for every number."""
    from sensor_msgs.msg import CompressedImage, Image

    picture = noisy_picture(np.random.default_rng(0))
    height, width, channels = picture.shape
    if raw:
        messages = [Image(height=height, width=width, encoding="rgb8", step=width * channels) for _ in range(CYCLE)]
    else:
        messages = [CompressedImage(format="jpeg") for _ in range(CYCLE)]
        quality = next(q for q in range(95, 5, -1) if len(encoded(numbered(picture, 0), q)) <= JPEG_BYTES)
    for number, message in enumerate(messages):
        numbered(picture, number)
        message.data.frombytes(picture.tobytes() if raw else encoded(picture, quality))
    return messages


def number_of(picture: np.ndarray) -> int:
    """The number in a decoded picture's top row."""
    middle = picture[BLOCK // 2, BLOCK // 2 : BITS * BLOCK : BLOCK, 0]
    return int(sum(1 << bit for bit in range(BITS) if middle[bit] > 127))


def stamp(message: Any, now: int) -> None:
    """Sets a header's stamp to a time in nanoseconds."""
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(now, 10**9)


def cameras(folder: str, end: Any, phases: tuple[float, ...], kind: Load) -> None:
    """Publishes the cameras. The images are encoded in advance, because real cameras encode outside this machine."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data

    from clp_ros.robots.embodiment import load_embodiment

    messages = camera_messages(kind.raw)
    topics = [camera.topic for camera in load_embodiment(kind.embodiment(folder)).cameras.values()]
    rclpy.init()
    publisher_node = rclpy.create_node("cameras")
    publishers = [publisher_node.create_publisher(type(messages[0]), t, qos_profile_sensor_data) for t in topics]
    stamps: list[list[int]] = [[] for _ in CAMERAS]
    began = time.monotonic()
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
    """Receives the left arm's trajectories, and records the times."""
    import rclpy
    from trajectory_msgs.msg import JointTrajectory

    from clp_ros.control.output import PAST_NS
    from clp_ros.robots.embodiment import load_embodiment

    received: list[tuple[int, int]] = []
    # A message's stamp is this much earlier than the message: the trajectory begins with steps that have passed.
    early_ns = PAST_NS + 2 * load_embodiment("aloha_bimanual").period_ns

    def receive(message: JointTrajectory) -> None:
        now = time.time_ns()
        received.append((message.header.stamp.sec * 10**9 + message.header.stamp.nanosec + early_ns, now))

    rclpy.init()
    receiving = rclpy.create_node("receiver")
    receiving.create_subscription(JointTrajectory, "/follower_left/arm_controller/joint_trajectory", receive, 1)
    while not end.is_set():
        rclpy.spin_once(receiving, timeout_sec=0.1)
    np.save(Path(folder, "receiver.npy"), np.array(received))
    rclpy.shutdown()


def node(folder: str, end: Any, kind: Load) -> None:
    """Runs the policy node with a policy that reads the images' numbers."""
    from dataclasses import asdict

    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    from clp_ros.nodes.policy import PolicyNode

    used: list[tuple[int, ...]] = []
    times: list[int] = []
    rng = np.random.default_rng(0)

    class Reader:
        chunk_size = 50

        def check_features(self, cameras: list[str], action_size: int, whose: str) -> None:
            pass

        def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
            times.append(time.time_ns())
            numbers = tuple(number_of(images[f"observation.images.{camera}"]) for camera in CAMERAS)
            used.append(numbers)
            return state + rng.normal(scale=NOISE, size=(self.chunk_size, len(state)))

    parameters = {"checkpoint": folder, "embodiment": kind.embodiment(folder), "task": "hold still", "replan_steps": 0}
    parameters |= {"mode": "ensemble", "log_folder": folder, "robot_description_wait": 0.0}
    rclpy.init(args=["--ros-args", *(x for k, v in parameters.items() for x in ("-p", f"{k}:={v}"))])
    policy_node = PolicyNode(lambda *_: Reader())
    executor = SingleThreadedExecutor()  # as the policy node's main() has it
    executor.add_node(policy_node)

    def spin() -> None:
        with suppress(ExternalShutdownException):  # raised by rclpy.shutdown()
            executor.spin()

    spinning = threading.Thread(target=spin)
    spinning.start()
    policy_node.trigger_configure()
    policy_node.trigger_activate()
    end.wait()
    try:
        runner = policy_node.runner
        policy_node.trigger_deactivate()  # fails if the node has stopped
        statistics = {name: asdict(spread) for name, spread in runner.statistics.spreads().items()}
        Path(folder, "node.json").write_text(json.dumps(statistics))
        np.save(Path(folder, "node.npy"), np.column_stack([used, times]))
    finally:
        rclpy.shutdown()
        spinning.join()
        policy_node.destroy_node()


if __name__ == "__main__":
    sys.exit(main())
