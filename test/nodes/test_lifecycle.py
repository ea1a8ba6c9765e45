# SPDX-License-Identifier: Apache-2.0
"""Transitions that fail, or run while the node ends: the caller gets an answer, and all is released once."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from ros_tools import Peer, spinning, wait_for
from std_srvs.srv import Trigger

from clp_ros.nodes.lifecycle import REFUSALS, ManagedNode
from clp_ros.nodes.policy import PolicyNode
from clp_ros.nodes.spin import _OneThread

SUCCESS = TransitionCallbackReturn.SUCCESS


@pytest.fixture
def ros(ros_domain: int) -> Iterator[Callable[..., None]]:
    """Initialises rclpy for nodes in this process, with command-line arguments."""
    yield lambda *args: rclpy.init(args=list(args), domain_id=ros_domain)
    rclpy.try_shutdown()


class Failing(ManagedNode):
    """Raises a given exception at a given place."""

    def __init__(self, where: dict[str, BaseException]) -> None:
        self.where = where
        self.failures: list[BaseException] = []
        super().__init__("failing")

    def _maybe(self, name: str) -> TransitionCallbackReturn:
        if name in self.where:
            raise self.where[name]
        return SUCCESS

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._maybe("configure")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._maybe("activate")

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._maybe("error")

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)


def spun(node: ManagedNode) -> AbstractContextManager[None]:
    """Spins a node as :func:`clp_ros.nodes.spin.main` does, in a thread until the end of the block."""
    executor = _OneThread()
    executor.add_node(node)
    return spinning(executor)


CONFIGURE, ACTIVATE = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE


@pytest.mark.parametrize(
    ("where", "steps", "state"),
    [
        ({"configure": SystemExit("a library gives up")}, [CONFIGURE], "unconfigured"),
        ({"activate": KeyError("a bug")}, [CONFIGURE, ACTIVATE], "unconfigured"),
        ({"configure": KeyError("a bug"), "error": MemoryError("another")}, [CONFIGURE], "finalized"),
        # What comes out of rclpy's own code, and of none of the node's callbacks.
        ({"rclpy": RuntimeError("not rclpy's RCLError")}, [CONFIGURE], "unconfigured"),
    ],
)
def test_a_transition_that_raises_is_answered(
    ros: Callable[..., None], peer: Peer, where: dict[str, BaseException], steps: list[int], state: str
) -> None:
    ros()
    node = Failing(where)
    if "rclpy" in where:

        def change(request: Any, response: Any) -> Any:
            raise where["rclpy"]

        node._change = change
    with spun(node):
        requests = [ChangeState.Request(transition=Transition(id=step)) for step in steps]
        answers = [peer.call(ChangeState, "/failing/change_state", request, timeout=20) for request in requests]
        assert [answer.success for answer in answers] == [True] * (len(steps) - 1) + [False]
        assert peer.call(GetState, "/failing/get_state").current_state.label == state
        assert node.failures == [error for place, error in where.items() if place != "rclpy"]
    node.destroy_node()


class Slow(ManagedNode):
    """Takes long to configure, and notes what runs at once."""

    def __init__(self) -> None:
        self.events: list[str] = []
        super().__init__("slow")

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.events.append("configuring")
        time.sleep(0.5)
        self.events.append("configured")
        return SUCCESS

    def release(self) -> None:
        self.events.append("released")


def test_the_end_waits_for_the_transition_that_runs_and_allows_no_other(ros: Callable[..., None], peer: Peer) -> None:
    ros()
    node = Slow()
    with spun(node):
        request = ChangeState.Request(transition=Transition(id=CONFIGURE))
        peer.start_call(ChangeState, "/slow/change_state", request)
        wait_for(lambda: node.events, "the transition")
        assert not peer.call(ChangeState, "/slow/change_state", request).success  # a second one meanwhile
    rclpy.shutdown()
    node.destroy_node()
    assert node.events == ["configuring", "configured", "released"]


class Echo:
    chunk_size = 100

    def check_features(self, features: Any, action_size: int, whose: str) -> None: ...


def configured(ros: Callable[..., None], tmp_path: Path) -> PolicyNode:
    """A policy node, configured without a robot."""
    parameters = {
        "checkpoint": tmp_path,
        "embodiment": "aloha_bimanual",
        "task": "fold_shorts",
        "robot_description_wait": 0.0,
    }
    ros("--ros-args", *(part for name, value in parameters.items() for part in ("-p", f"{name}:={value}")))
    node = PolicyNode(lambda folder, device: Echo())
    assert node.exclusively(node.trigger_configure) == SUCCESS
    return node


@pytest.mark.parametrize("fails", [False, True])
def test_cleaning_up_and_ending_at_once_close_the_runner_once(
    ros: Callable[..., None], tmp_path: Path, fails: bool
) -> None:
    node = configured(ros, tmp_path)
    runner, closed, begun = node.runner, [], threading.Event()
    close = runner.close

    def slow(timeout_s: float) -> bool:
        closed.append(timeout_s)
        begun.set()
        time.sleep(0.3)
        close(timeout_s)
        if fails:
            raise RuntimeError("the stop was not sent")
        return True

    runner.close = slow

    def clean_up() -> None:
        with suppress(*REFUSALS):  # ROS has ended before the transition has
            node.exclusively(node.trigger_cleanup)

    cleaning = threading.Thread(target=clean_up)
    cleaning.start()
    assert begun.wait(5)
    node.brake()  # what the process does after a signal
    rclpy.shutdown()
    node.destroy_node()
    cleaning.join()
    assert len(closed) == 1
    assert node.runner is None
    assert not [thread for thread in threading.enumerate() if thread.name in ("policy", "watchdog")]


def test_a_stop_that_cannot_be_sent_is_answered(ros: Callable[..., None], peer: Peer, tmp_path: Path) -> None:
    node = configured(ros, tmp_path)

    def unsent() -> None:
        raise RuntimeError("the publisher is gone")

    node.runner.stop = unsent
    with spun(node):
        answer = peer.call(Trigger, "/policy/stop", timeout=20)
    assert not answer.success
    assert "the publisher is gone" in answer.message
    node.destroy_node()
