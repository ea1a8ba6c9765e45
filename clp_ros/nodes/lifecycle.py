# SPDX-License-Identifier: Apache-2.0
"""A managed node whose transitions may take long."""

from __future__ import annotations

import threading
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNodeMixin
from rclpy.node import Node
from rclpy.task import Future


class ManagedNode(LifecycleNodeMixin, Node):
    """A lifecycle node that answers its services while a transition runs.

    Args:
        name: The node's.
    """

    def __init__(self, name: str) -> None:
        Node.__init__(self, name)
        # Reentrant: get_state answers while a transition is under way. A second transition is refused meanwhile.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        self._change = self._service_change_state.callback
        self._service_change_state.callback = self._change_state

    async def _change_state(self, request: ChangeState.Request, response: ChangeState.Response) -> Any:
        """Runs a transition in a thread of its own, and refuses one that does not exist in this state.

        rclpy's own callback would keep the executor from all else, and lets RCLError out, which ends the node.
        """
        done: Future = Future()

        def change() -> None:
            try:
                self._change(request, response)
            except (rclpy_implementation.RCLError, rclpy_implementation.InvalidHandle):
                if not self.context.ok():
                    return  # a signal has ended ROS meanwhile
                response.success = False
                transition = request.transition.label or request.transition.id
                self.get_logger().warning(f"no transition {transition} in state {self.state}")
            done.set_result(response)
            if self.executor is not None:
                self.executor.wake()

        threading.Thread(target=change, name="transition").start()
        return await done

    @property
    def state(self) -> str:
        """The lifecycle's state: ``unconfigured``, ``inactive``, ``active``, ``finalized``, or one between two."""
        return self._state_machine.current_state[1]
