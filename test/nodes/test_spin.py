# SPDX-License-Identifier: Apache-2.0
"""How a node's process ends."""

import signal
from pathlib import Path

import pytest
from ros_tools import running, wait_for

# A signal comes while a callback is at work, and a second one in the last words.
NODE = """
import os, sys, time
from rclpy.node import Node
from clp_ros.nodes.spin import main

class Signalled(Node):
    def __init__(self):
        super().__init__("signalled")
        self.create_timer(0.01, self.work)
    def work(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)
        print("the callback's end", flush=True)
    def last_words(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)
        print("last words", flush=True)

sys.exit(main(Signalled, threads=1, last_words=Signalled.last_words))
"""


@pytest.mark.usefixtures("ros_domain")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cuts_neither_a_callback_nor_the_last_words_short(tmp_path: Path, number: signal.Signals) -> None:
    with running(["-c", NODE, str(int(number))], tmp_path / "log.txt") as node:
        assert node.process.wait(60) == 0
    assert node.log.splitlines() == ["the callback's end", "last words"]


# A callback raises.
FAILING = """
import sys
from rclpy.node import Node
from clp_ros.nodes.spin import main

class Failing(Node):
    def __init__(self):
        super().__init__("failing")
        self.create_timer(0.01, self.work)
    def work(self):
        raise KeyError("not a fault of the user's")
    def last_words(self):
        print("last words", self.context.ok(), flush=True)

sys.exit(main(Failing, threads=1, last_words=Failing.last_words))
"""


@pytest.mark.usefixtures("ros_domain")
def test_a_callback_that_raises_ends_the_node_after_its_last_words(tmp_path: Path) -> None:
    with running(["-c", FAILING], tmp_path / "log.txt") as node:
        assert node.process.wait(60) == 1
    assert node.log.startswith("last words True\n")
    assert "KeyError" in node.log


# What another thread destroys is among what the executor is about to wait for.
DESTROYING = """
import sys, threading, time
from rclpy.node import Node
from std_msgs.msg import String
from clp_ros.nodes.spin import main

class Changing(Node):
    def __init__(self):
        super().__init__("changing")
        self.create_timer(0.001, lambda: None)
        self.spinning, self.changes = True, 0
        self.thread = threading.Thread(target=self.keep_changing)
        self.thread.start()
    def keep_changing(self):
        try:
            while self.spinning:
                self.change()
        except Exception:
            if self.context.ok():  # else the signal has ended ROS meanwhile
                raise
    def change(self):
        several = [self.create_subscription(String, f"topic_{n}", lambda _: None, 1) for n in range(10)]
        publishers = [self.create_publisher(String, f"topic_{n}", 1) for n in range(10)]
        time.sleep(0.001)
        for one in several:
            self.destroy_subscription(one)
        for one in publishers:
            self.destroy_publisher(one)
        self.changes += 1
        if self.changes == 100:
            print("a hundred times", flush=True)
    def destroy_node(self):
        self.spinning = False
        self.thread.join()
        super().destroy_node()

sys.setswitchinterval(1e-6)  # the threads change places much more often than they would
sys.exit(main(Changing, threads=int(sys.argv[1])))
"""


@pytest.mark.usefixtures("ros_domain")
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_may_destroy_what_the_executor_waits_for(tmp_path: Path, threads: int) -> None:
    with running(["-c", DESTROYING, str(threads)], tmp_path / "log.txt") as node:
        wait_for(lambda: "a hundred times" in node.log or node.process.poll() is not None, "the changes", 60)
        assert node.stop(signal.SIGTERM) == 0
    assert node.log.splitlines() == ["a hundred times"]
