# SPDX-License-Identifier: Apache-2.0
"""Python programs as processes of their own, without the seconds that importing PyTorch and LeRobot takes each.

A server (multiprocessing's forkserver) imports the large libraries once for a test run. A program is a fork of it: it
has its own process id, signals, file descriptors, environment, working folder and exit code, and runs as ``__main__``.
clp_ros itself is imported anew by each. What only a new interpreter shows (which modules a command imports, what an
import prints) is tested with ``subprocess``.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

# Imported by the server, where they are installed.
LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "lerobot.policies.factory",
    "lerobot.policies.smolvla.modeling_smolvla",
    "lerobot.policies.pi0.modeling_pi0",
    "lerobot.policies.pi05.modeling_pi05",
    "lerobot.policies.groot.modeling_groot",
    "lerobot.datasets.lerobot_dataset",
    "lerobot.scripts.lerobot_train",
    "lerobot.scripts.lerobot_eval",
    "matplotlib.figure",
    "pydantic",
    "rclpy",
    "rosbags.highlevel",
    "scipy.stats",
)


@functools.cache
def server() -> ForkServerContext:
    """The server's context; the first call starts the server.

    What the Hugging Face libraries read from the environment when they are imported holds for all programs: no network,
    and nothing from a user's cache.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    home = tempfile.TemporaryDirectory(prefix="clp_ros_hub_")
    atexit.register(home.cleanup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", home.name)
        forkserver.ensure_running()
    return context


@functools.cache
def _plain_path() -> list[str]:
    """``sys.path`` of a new interpreter of this environment, without PYTHONPATH."""
    code = "import sys; print('\\n'.join(sys.path))"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


class Program:
    """A running program, with what tests use of ``subprocess.Popen``."""

    def __init__(
        self,
        command: Sequence[str],
        stdout: Path,
        stderr: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Starts ``python <command>``.

        Args:
            command: ``-m MODULE``, ``-c CODE`` or a script's path, then its arguments.
            stdout: A file, which is emptied first.
            stderr: By default, the same.
            env: The whole environment; by default this process's.
            cwd: Working folder; by default this process's.
        """
        files = (str(stdout), str(stderr or stdout))
        for file in files:
            Path(file).write_bytes(b"")
        given = (list(map(str, command)), files, dict(env or os.environ), str(cwd or Path.cwd()), _plain_path())
        self._process = server().Process(target=_run, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("the program", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs ``python <command>`` to its end and captures what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        program = Program(command, out, err, env, cwd)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        return subprocess.CompletedProcess(
            list(command), code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


def _run(command: list[str], files: tuple[str, str], env: dict[str, str], cwd: str, path: list[str]) -> None:
    """In the fork: becomes the program."""
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    unbuffered = bool(env.get("PYTHONUNBUFFERED"))
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False, buffering=-1)  # noqa: SIM115
    sys.stdout.reconfigure(write_through=unbuffered)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if threads := env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # read from the environment when torch is imported

    extra = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kind, *arguments = command
    first = cwd if kind in ("-m", "-c") else str(Path(kind).parent)
    sys.path[:] = [first, *extra, *path]
    try:
        if kind == "-c":
            code, *sys.argv[1:] = arguments
            sys.argv[0] = "-c"
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(code, "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            module, *sys.argv[1:] = arguments
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = command
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's processes leave out
