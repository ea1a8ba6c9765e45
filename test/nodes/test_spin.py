# SPDX-License-Identifier: Apache-2.0
"""How a node's process ends."""

import signal
from pathlib import Path

import pytest
from ros_tools import running

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
