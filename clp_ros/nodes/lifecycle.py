# SPDX-License-Identifier: Apache-2.0
"""A managed node (rclpy lifecycle) whose transitions may take long."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.task import Future

from clp_ros.nodes.compat import RCLError, lifecycle_state, replace_change_state

# Raised by rclpy for a transition that does not exist in the present state, and for destroyed entities.
REFUSALS = (RCLError, InvalidHandle)

TransitionCallback = Callable[[LifecycleState], TransitionCallbackReturn]


class BusyError(Exception):
    """Another transition is in progress, or the node is being destroyed."""


class ManagedNode(LifecycleNodeMixin, Node):
    """A lifecycle node that answers its services while a transition runs.

    At most one transition runs at a time. :meth:`destroy_node` waits for it, and no other begins after that. So
    :meth:`release`, in which a subclass frees its resources, never runs concurrently.

    Args:
        name: The node's name.
    """

    def __init__(self, name: str) -> None:
        Node.__init__(self, name)
        for callback in ("on_configure", "on_cleanup", "on_activate", "on_deactivate", "on_shutdown", "on_error"):
            setattr(self, callback, self._logged(getattr(self, callback)))  # before rclpy reads them, once
        # Reentrant, so that get_state answers during a transition. A second transition is refused meanwhile.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self._changing = threading.Lock()
        self._destroyed = False
        self._change = replace_change_state(self, self._change_state)

    def exclusively(self, change: Callable[[], Any]) -> Any:
        """Runs a transition, and returns its result.

        Args:
            change: The transition, such as ``trigger_deactivate``.

        Raises:
            BusyError: Another transition runs, or the node is being destroyed.
        """
        if not self._changing.acquire(blocking=False):
            raise BusyError
        try:
            return change()
        finally:
            self._changing.release()

    def release(self) -> None:
        """Frees what the transitions created. Called before the node is destroyed, when no transition can run."""

    def destroy_node(self) -> None:
        """Waits for a running transition, forbids further ones, calls :meth:`release` and destroys the node."""
        if not self._destroyed:
            self._changing.acquire()  # and never release it, so that no transition follows
            self._destroyed = True
            self.release()
        super().destroy_node()

    async def _change_state(self, request: ChangeState.Request, response: ChangeState.Response) -> Any:
        """Runs a transition in a thread of its own, and refuses one that does not exist in this state.

        rclpy's own callback would block the executor, and its RCLError would end the node. The caller always gets an
        answer, also after an error: otherwise it would wait for ever.
        """
        done: Future = Future()

        def change() -> None:
            try:
                self.exclusively(lambda: self._change(request, response))
            except (BusyError, *REFUSALS):
                response.success = False
                if self.context.ok():  # else a signal has ended ROS
                    transition = request.transition.label or request.transition.id
                    self.get_logger().warning(f"no transition {transition} in state {self.state}")
            except BaseException:  # noqa: BLE001 - the caller needs an answer
                response.success = False
                self.get_logger().error(f"the transition failed\n{traceback.format_exc()}")
            finally:
                done.set_result(response)
                if (executor := self.executor) is not None and self.context.ok():
                    executor.wake()

        threading.Thread(target=change, name="transition").start()
        return await done

    def _logged(self, callback: TransitionCallback) -> TransitionCallback:
        """Wraps a transition's callback so that its exceptions are logged; rclpy would turn them into ERROR silently.

        This includes SystemExit, which libraries raise too. It would leave the node between two states.
        """

        def logged(state: LifecycleState) -> TransitionCallbackReturn:
            try:
                return callback(state)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the node goes to its error state
                name = getattr(callback, "__name__", "a transition")
                self.get_logger().error(f"{name} failed\n{traceback.format_exc()}")
                self.failed(error)
                return TransitionCallbackReturn.ERROR

        return logged

    def failed(self, error: BaseException) -> None:
        """Called with an unexpected exception of a transition's callback. The transition then fails with ERROR."""

    @property
    def state(self) -> str:
        """The state: ``unconfigured``, ``inactive``, ``active``, ``finalized``, or that of a transition in progress."""
        return lifecycle_state(self)
