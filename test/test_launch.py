# SPDX-License-Identifier: Apache-2.0
"""The launch files, run by the real launch and ros2; both are missing where ROS 2 comes from PyPI."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILES = sorted(ROOT.glob("launch/*.launch.py"))
PROFILE = ROOT / "config" / "dds" / "fastdds.xml"
TIMEOUT = 180.0  # seconds, for what takes a few; only a fault ever waits as long


@pytest.fixture
def launch_arguments() -> Callable[[Path], dict[str, str]]:
    """Reads the arguments of a launch file and their descriptions with launch itself."""
    # Not "launch": in the checkout's root, the folder of launch files would pass for it.
    reason = "launch and launch_ros are not on PyPI: source a ROS 2 environment"
    pytest.importorskip("launch_ros.actions", reason=reason)
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    def read(path: Path) -> dict[str, str]:
        description = get_launch_description_from_python_launch_file(str(path))
        return {argument.name: argument.description for argument in description.get_launch_arguments()}

    return read


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_every_argument_is_described(path: Path, launch_arguments: Callable[[Path], dict[str, str]]) -> None:
    arguments = launch_arguments(path)
    assert {"params_file", "namespace"} <= set(arguments)
    for name, description in arguments.items():
        assert re.match(r"[A-Z].{10}", description), name
        assert description != "no description given", name


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("calibrate", {"bag", "embodiment", "task", "samples", "output", "overwrite", "seed", "device"}),
        ("prune", {"calibration", "output", "overwrite", "budgets", "threshold", "criterion", "seed"}),
        ("convert", {"bags", "embodiment", "output", "task", "episodes_by", "images", "exit_when_done"}),
        ("finetune", {"dataset", "output", "overwrite", "resume", "steps", "batch_size", "train", "options"}),
        ("policy", {"heads", "embodiment", "task", "sim", "tf_prefix", "topics", "robot_description_wait"}),
        ("aloha_bimanual", {"embodiment", "task", "device", "autostart", "raw_images", "cam_left_wrist_topic"}),
        ("ur5", {"cam_wrist_topic", "ur_joint_states_topic", "ur_robot_description_topic", "speed_scaling_topic"}),
        ("fold_shorts", {"task", "tf_prefix", "cam_high_topic", "left_arm_controller_topic"}),
        ("groceries_to_basket", {"object", "cam_front_topic"}),
    ],
)
def test_promised_arguments(file: str, expected: set[str], launch_arguments: Callable[[Path], dict[str, str]]) -> None:
    assert expected <= set(launch_arguments(ROOT / "launch" / f"{file}.launch.py"))


def test_arguments_that_are_parameters_have_the_nodes_types() -> None:
    pytest.importorskip("launch_ros.actions", reason="launch and launch_ros are not on PyPI")
    from clp_ros.nodes import calibration, conversion, finetuning, launch_node, policy_settings, pruning

    declared = (
        calibration.PARAMETERS,
        conversion.PARAMETERS,
        finetuning.PARAMETERS,
        pruning.PARAMETERS,
        policy_settings.PARAMETERS,
    )
    for name, (kind, _) in launch_node.PARAMETERS.items():
        defaults = [parameters[name][0] for parameters in declared if name in parameters]
        assert defaults or name == "use_sim_time", name  # which every node has
        # A node's parameter bag is one folder or a list of them.
        assert {type(default) for default in defaults} <= {
            list if kind == list[str] else kind,
            *([str] * (name == "bag")),
        }


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that colcon's local_setup.bash makes, of a build of this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for program in ("ros2", "colcon"):
        if not shutil.which(program, path=path):
            pytest.skip(f"no {program} here: source a ROS 2 environment, and install requirements-dev.txt")
    workspace = tmp_path_factory.mktemp("workspace")
    for name in ("package.xml", "setup.py", "setup.cfg", "resource", "clp_ros", "config", "launch"):
        (workspace / "clp_ros").mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, workspace / "clp_ros" / name)
    environment = os.environ | {"PATH": path}
    subprocess.run(["colcon", "build"], cwd=workspace, env=environment, check=True, capture_output=True)
    source = ". install/local_setup.bash && env -0"
    output = subprocess.run(
        ["bash", "-c", source], cwd=workspace, env=environment, check=True, capture_output=True, text=True
    ).stdout
    return dict(line.partition("=")[::2] for line in output.split("\0") if line)


@contextmanager
def ros2_launch(environment: dict[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ``ros2 launch clp_ros ...`` in a session of its own, with ROS_DOMAIN_ID and the like of this process."""
    ros = {name: value for name, value in os.environ.items() if name.startswith("ROS_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["ros2", "launch", "clp_ros", *arguments],
            env=environment | ros | {"ROS_LOG_DIR": str(log.parent)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A test run in the background ignores SIGINT, and so would everything it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield process
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], log: Path, what: str) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"not within {TIMEOUT} s: {what}\n{log.read_text()}"
        time.sleep(0.1)


def interrupt(process: subprocess.Popen[bytes], log: Path) -> None:
    """Ctrl-C, and nothing is left."""
    process.send_signal(signal.SIGINT)
    process.wait(TIMEOUT)
    wait_until(lambda: not group_lives(process.pid), log, "no process of the launch is left")
    assert "Traceback" not in log.read_text(), log.read_text()


@contextmanager
def replay() -> Iterator[None]:
    """Plays the recorded demonstration until the end of the block, in this test's domain."""
    command = [sys.executable, "-m", "clp_ros.nodes.replay", str(ROOT / "rosbags" / "aloha_bimanual"), "--loop"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def ros2(environment: dict[str, str], *arguments: str) -> str:
    """Runs a ros2 command in this test's domain; without its daemon, most find a node only after some tries."""
    ros = {name: value for name, value in os.environ.items() if name.startswith("ROS_")}
    result = subprocess.run(
        ["ros2", *arguments],
        env=environment | ros,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return result.stdout + result.stderr


@pytest.mark.usefixtures("ros_domain")
def test_a_missing_argument_is_named(installed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ros2_launch(installed, log, "calibrate.launch.py") as process:
        assert process.wait(TIMEOUT) != 0
    assert "checkpoint" in log.read_text()


@pytest.mark.usefixtures("ros_domain")
def test_pruning_answers_and_ends_on_ctrl_c(installed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ("prune.launch.py", f"checkpoint:={tmp_path}", "budgets:=vlm=2,expert=2", "namespace:=robot")
    with ros2_launch(installed, log, *arguments) as process:
        answer = ros2(installed, "service", "call", "/robot/pruning/prune", "std_srvs/srv/Trigger")
        assert "success=False" in answer
        assert "there is no calibration" in answer
        budgets = ("param", "get", "--no-daemon", "/robot/pruning", "budgets")
        wait_until(lambda: "['vlm=2', 'expert=2']" in ros2(installed, *budgets), log, "both budgets are set")
        interrupt(process, log)


@pytest.mark.usefixtures("ros_domain")
@pytest.mark.parametrize("exit_when_done", [True, False])
def test_a_calibration_that_fails_ends_the_launch_if_asked(
    exit_when_done: bool, installed: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    # In YAML the task would be a bool, and the bag a number.
    fault = "unknown task 'no'"
    arguments = ["embodiment:=aloha_bimanual", "task:=no", "bag:=12", f"exit_when_done:={str(exit_when_done).lower()}"]
    with ros2_launch(installed, log, "calibrate.launch.py", f"checkpoint:={tmp_path}", *arguments) as process:
        wait_until(lambda: fault in log.read_text(), log, "the node names the fault")
        if exit_when_done:
            assert process.wait(TIMEOUT) == 1
            wait_until(lambda: not group_lives(process.pid), log, "no process of the launch is left")
        else:
            echo = ("topic", "echo", "--no-daemon", "--once", "/diagnostics", "diagnostic_msgs/msg/DiagnosticArray")
            # As YAML writes a quote in quotes.
            wait_until(lambda: fault.replace("'", "''") in ros2(installed, *echo), log, "the fault on /diagnostics")
            interrupt(process, log)


@pytest.mark.usefixtures("ros_domain")
def test_a_pipeline_that_fails_ends_the_launch(installed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = [
        f"checkpoint:={tmp_path / 'base'}",
        "embodiment:=aloha_bimanual",
        "task:=no",
        f"output:={tmp_path / 'out'}",
    ]
    arguments += ["bags:=one,two", "train:=last=2", "steps:=5", "exit_when_done:=true"]
    with ros2_launch(installed, log, "pipeline.launch.py", *arguments) as process:
        assert process.wait(TIMEOUT) == 1
        wait_until(lambda: not group_lives(process.pid), log, "no process of the launch is left")
    assert "unknown task 'no'" in log.read_text()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, installed: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    command = f"clp make-checkpoint --family smolvla --size tiny --embodiment aloha_bimanual --output {folder}"
    subprocess.run(["ros2", "run", "clp_ros", *command.split()], env=installed, check=True, capture_output=True)
    return folder


@pytest.mark.usefixtures("ros_domain")
def test_a_calibration_ends_the_launch_with_its_result(
    installed: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    arguments = [f"checkpoint:={checkpoint}", "embodiment:=aloha_bimanual", "task:=transfer_cube", "samples:=2"]
    arguments += [f"bag:={ROOT / 'rosbags' / 'aloha_bimanual'}", f"output:={tmp_path / 'made'}", "exit_when_done:=true"]
    for more, code, words in (
        ((), 0, "calibrated on 2 frames"),
        ((), 1, "is not empty"),
        (("overwrite:=true",), 0, "calibrated on 2 frames"),
    ):
        with ros2_launch(installed, log, "calibrate.launch.py", *arguments, *more) as process:
            assert process.wait(TIMEOUT) == code, log.read_text()
            wait_until(lambda: not group_lives(process.pid), log, "no process of the launch is left")
        assert words in log.read_text()


@pytest.mark.usefixtures("ros_domain")
def test_a_tasks_launch_file_takes_prefix_topics_and_object(installed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = ["tf_prefix:=left_", "cam_wrist_topic:=/wrist/compressed", "topics:=controllers.arm:=/left/trajectory"]
    file = ("groceries_to_basket.launch.py", f"checkpoint:={tmp_path}", "object:=olive_oil", "autostart:=false")
    with ros2_launch(installed, log, *file, *given) as process:
        expected = {
            "task": "groceries_to_basket:olive_oil",
            "embodiment": "ur10e",
            "tf_prefix": "left_",
            "topics": "['controllers.arm:=/left/trajectory', 'cameras.cam_wrist:=/wrist/compressed']",
        }
        for name, value in expected.items():
            get = ("param", "get", "--no-daemon", "/policy", name)
            wait_until(lambda: value in ros2(installed, *get), log, f"{name} is {value}")  # noqa: B023
        interrupt(process, log)
    with ros2_launch(installed, log, *file[:2], "object:=oliv") as process:
        assert process.wait(TIMEOUT) != 0
    assert "olive_oil" in log.read_text()


@pytest.mark.usefixtures("ros_domain")
def test_a_task_on_another_robot_is_refused(installed: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    file = ("serve_napkin.launch.py", f"checkpoint:={tmp_path}", "embodiment:=aloha_single")
    with ros2_launch(installed, log, *file) as process:
        wait_until(lambda: "the task is for ur5, but the robot is aloha_single" in log.read_text(), log, "the refusal")
        interrupt(process, log)


@pytest.fixture
def patient(tmp_path: Path) -> str:
    """The argument for parameters with which random weights go on driving, and a slow machine is waited for."""
    parameters = {"max_deviation": 100.0, "max_faults": 0, "max_latency": 30.0}
    parameters |= {"activate_timeout": TIMEOUT, "input_timeout": 5.0, "log_folder": str(tmp_path / "runs")}
    (tmp_path / "policy.yaml").write_text(json.dumps({"/**": {"ros__parameters": parameters}}))  # JSON is YAML
    return f"params_file:={tmp_path / 'policy.yaml'}"


@pytest.mark.usefixtures("ros_domain")
def test_the_policy_comes_up_active_and_stays_as_a_person_sets_it(
    installed: dict[str, str], checkpoint: Path, patient: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    # A task's launch file; the recording is its robot, for a node may wait for inputs before it becomes active.
    arguments = ("transfer_cube.launch.py", f"checkpoint:={checkpoint}", "device:=cpu", "robot_description_wait:=0.5")
    arguments += (patient,)
    with replay(), ros2_launch(installed, log, *arguments) as process:

        def state() -> str:
            return ros2(installed, "lifecycle", "get", "--no-daemon", "/policy")

        wait_until(lambda: state().startswith("active"), log, "the policy node is active")
        assert "no description on /follower_left/robot_description" in log.read_text()
        deactivate = ("lifecycle", "set", "--no-daemon", "/policy", "deactivate")
        wait_until(lambda: "Transitioning successful" in ros2(installed, *deactivate), log, "the policy is inactive")
        time.sleep(2)  # in which launch must not activate it again
        states: list[str] = []
        wait_until(lambda: "active" in (states.append(state()) or states[-1]), log, "the node tells its state")
        assert states[-1].startswith("inactive")
        interrupt(process, log)


def test_a_simulated_robot_is_driven_and_all_ends_on_ctrl_c(
    installed: dict[str, str], checkpoint: Path, patient: str, tmp_path: Path, peer: Any
) -> None:
    if not all(importlib.util.find_spec(package) for package in ("mujoco", "gym_aloha")):
        pytest.skip("the simulation's packages are in requirements-simulation.txt")
    from clp_ros.core.errors import ClpError
    from clp_ros.robots.embodiment import load_embodiment
    from clp_ros.simulation.robot import SimulatedRobot

    embodiment = load_embodiment("aloha_bimanual")
    robot = SimulatedRobot(embodiment)
    try:
        robot.picture("cam_high", 48, 64)
    except ClpError as error:
        pytest.skip(str(error))
    finally:
        robot.close()
    from sensor_msgs.msg import JointState
    from trajectory_msgs.msg import JointTrajectory

    sent = [peer.hear(JointTrajectory, controller.topic) for controller in embodiment.controllers.values()]
    states = peer.hear(JointState, embodiment.joint_states["follower_left"].topic)
    log = tmp_path / "log"

    def chunks() -> int:
        runs = (tmp_path / "runs").glob("*.jsonl")
        return sum(json.loads(line)["event"] == "chunk" for run in runs for line in run.read_text().splitlines())

    # A machine that draws slowly has no three pictures that are less than 100 ms old.
    slow = embodiment.model_dump()
    for source in (*slow["cameras"].values(), *slow["joint_states"].values()):
        source["sync"]["tolerance_ms"] = 5000.0
    (tmp_path / "slow.yaml").write_text(json.dumps(slow))
    arguments = ("fold_shorts.launch.py", "sim:=true", f"checkpoint:={checkpoint}", "device:=cpu", patient)
    arguments += (f"embodiment:={tmp_path / 'slow.yaml'}",)
    with ros2_launch(installed, log, *arguments) as process:
        narrowed = "limits are narrowed to those of /follower_left/robot_description"
        wait_until(lambda: narrowed in log.read_text(), log, "the policy is loaded, and the robot's description heard")
        wait_until(lambda: chunks() >= 3 and all(sent), log, "chunks, and trajectories for every controller")
        began, arm = list(states[0].position), embodiment.controllers["left_arm"].joints
        wait_until(
            lambda: max(abs(now - then) for now, then in zip(states[-1].position, began, strict=True)) > 0.05,
            log,
            "the arm moves",
        )
        assert {tuple(message.joint_names) for message in sent[0]} == {tuple(joint.name for joint in arm)}
        assert "does not answer" not in log.read_text()  # the simulation has the controllers' parameters, too
        interrupt(process, log)


def test_fast_dds_takes_the_profile() -> None:
    pytest.importorskip("rclpy", reason="no ROS 2")
    code = "import rclpy; rclpy.init(); rclpy.create_node('profile'); rclpy.shutdown()"
    environment = os.environ | {
        "FASTRTPS_DEFAULT_PROFILES_FILE": str(PROFILE),
        "RMW_IMPLEMENTATION": "rmw_fastrtps_cpp",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    # Fast DDS goes on with its defaults when it cannot read a profile, and says so.
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
