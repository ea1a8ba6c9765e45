# SPDX-License-Identifier: Apache-2.0
"""A managed node whose transitions may take long."""

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

# What rclpy raises for a transition that does not exist in a state, and for what was destroyed meanwhile.
REFUSALS = (RCLError, InvalidHandle)

TransitionCallback = Callable[[LifecycleState], TransitionCallbackReturn]


class BusyError(Exception):
    """Another transition is under way, or the node is being destroyed."""


class ManagedNode(LifecycleNodeMixin, Node):
    """A lifecycle node that answers its services while a transition runs.

    One transition runs at a time, and none when the node is destroyed: :meth:`destroy_node` waits for the one that
    runs. So a subclass frees its resources in :meth:`release`, which never runs twice at once.

    Args:
        name: The node's.
    """

    def __init__(self, name: str) -> None:
        Node.__init__(self, name)
        for callback in ("on_configure", "on_cleanup", "on_activate", "on_deactivate", "on_shutdown", "on_error"):
            setattr(self, callback, self._logged(getattr(self, callback)))  # before rclpy looks them up, once
        # Reentrant: get_state answers while a transition is under way. A second transition is refused meanwhile.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self._changing = threading.Lock()
        self._destroyed = False
        self._change = replace_change_state(self, self._change_state)

    def exclusively(self, change: Callable[[], Any]) -> Any:
        """Runs a transition, and returns what it returns.

        Args:
            change: ``trigger_deactivate``, for example.

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
        """Frees what the transitions made. Called before the node is destroyed, when no transition can run."""

    def destroy_node(self) -> None:
        """Waits for the transition that runs, allows no other, releases everything and destroys the node."""
        if not self._destroyed:
            self._changing.acquire()  # for ever
            self._destroyed = True
            self.release()
        super().destroy_node()

    async def _change_state(self, request: ChangeState.Request, response: ChangeState.Response) -> Any:
        """Runs a transition in a thread of its own, and refuses one that does not exist in this state.

        rclpy's own callback would keep the executor from all else, and lets RCLError out, which ends the node. The
        caller gets an answer whatever happens: a future that stays pending would keep the caller waiting for ever.
        """
        done: Future = Future()

        def change() -> None:
            try:
                self.exclusively(lambda: self._change(request, response))
            except (BusyError, *REFUSALS):
                response.success = False
                if self.context.ok():  # else a signal has ended ROS meanwhile
                    transition = request.transition.label or request.transition.id
                    self.get_logger().warning(f"no transition {transition} in state {self.state}")
            except BaseException:  # noqa: BLE001 - this thread ends here, and nobody else would answer
                response.success = False
                self.get_logger().error(f"the transition failed\n{traceback.format_exc()}")
            finally:
                done.set_result(response)
                if (executor := self.executor) is not None and self.context.ok():
                    executor.wake()

        threading.Thread(target=change, name="transition").start()
        return await done

    def _logged(self, callback: TransitionCallback) -> TransitionCallback:
        """A transition's callback whose exceptions are logged: rclpy turns them into ERROR without a word.

        SystemExit, which libraries raise too, is one of them: it would leave the node between two states.
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
        """Called with the unexpected exception of a transition's callback, which then counts as ERROR."""

    @property
    def state(self) -> str:
        """The lifecycle's state: ``unconfigured``, ``inactive``, ``active``, ``finalized``, or one between two."""
        return lifecycle_state(self)
