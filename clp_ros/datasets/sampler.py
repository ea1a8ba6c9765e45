# SPDX-License-Identifier: Apache-2.0
"""Samples messages of a bag or a live robot at control ticks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.datasets.commands import CommandBuffer
from clp_ros.messages.stamps import MAX_CLOCK_JUMP_NS
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, Observation, ObservationBuffer


@dataclass(frozen=True)
class Tick:
    """A control tick.

    Attributes:
        time_ns: When it is, nanoseconds on the clock the messages were received on.
        begins: Whether it is the first of a piece of the recording.
    """

    time_ns: int
    begins: bool


@dataclass(frozen=True)
class Sample:
    """The messages used at a control tick, with undecoded images.

    Attributes:
        time_ns: The tick.
        selected: (stamp, message) by input topic, from :meth:`ObservationBuffer.select`.
        action_stamps: Stamps of the messages of the action, by topic; empty if it is the next state.
    """

    time_ns: int
    selected: dict[str, tuple[int, Any]]
    action_stamps: Mapping[str, int]


class Sampler:
    """Takes the messages of a demonstration and samples them at control ticks.

    Ticks begin with the first message and are one control period apart. A receive stamp more than a second before or
    after the newest one begins a new piece: the recording was paused, its clock jumped, or a bag was played again.

    For each message, iterate over :meth:`ticks_before`, then call :meth:`add`; at the end, iterate over :meth:`end`.
    Call :meth:`select` and :meth:`target` for a tick before taking the next one. Not thread-safe.

    Args:
        embodiment: The robot.

    Attributes:
        embodiment: As the argument.
        pieces: Number of pieces begun.
        commanded: Whether actions come from topics. The action at a tick is then the :meth:`target` at that tick,
            otherwise the one at the next tick.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment = embodiment
        self.pieces = 0
        self.commanded = bool(embodiment.action_topics)
        self._buffer = ObservationBuffer(embodiment, keeps_images=True)
        self._commands = CommandBuffer(embodiment, self._buffer.state) if self.commanded else None
        self._topics = frozenset(embodiment.topics), frozenset(embodiment.action_topics)
        self._tick_ns = 0
        self._begins = True
        self._newest_ns: int | None = None

    @property
    def dropped(self) -> Counter[tuple[str, str]]:
        """Number of messages not used, by (topic, reason)."""
        return self._buffer.dropped if self._commands is None else self._buffer.dropped + self._commands.dropped

    def ticks_before(self, receive_ns: int) -> Iterator[Tick]:
        """Yields the control ticks that pass before a message."""
        if self._newest_ns is None or abs(receive_ns - self._newest_ns) > MAX_CLOCK_JUMP_NS:
            yield from self.end()
            self.pieces += 1
            self._tick_ns, self._begins, self._newest_ns = receive_ns, True, receive_ns
        self._newest_ns = max(receive_ns, self._newest_ns)
        while self._tick_ns < self._newest_ns:
            yield self._pass()

    def add(self, topic: str, message: Any, receive_ns: int) -> None:
        """Adds one message, after the ticks before it.

        Raises:
            ClpError: See :meth:`ObservationBuffer.add` and :meth:`CommandBuffer.add`.
        """
        receive_ns = receive_ns if self._newest_ns is None else max(receive_ns, self._newest_ns)
        inputs, commands = self._topics
        if topic in inputs:
            self._buffer.add(topic, message, receive_ns)
        if self._commands is not None and topic in commands:
            self._commands.add(topic, message, receive_ns)

    def end(self) -> Iterator[Tick]:
        """Yields the last tick of the piece, and then removes all messages."""
        if self._newest_ns is not None:
            yield self._pass()
        self._buffer.forget()
        if self._commands is not None:
            self._commands.forget()
        self._newest_ns = None

    def select(self, tick: Tick) -> Sample:
        """Returns the messages to use at a tick.

        Raises:
            NotReadyError: An input, or the command of a joint, is missing or stale.
        """
        selected = self._buffer.select(tick.time_ns)
        stamps = {} if self._commands is None else self._commands.at(tick.time_ns)[1]
        return Sample(tick.time_ns, selected, stamps)

    def state(self, tick: Tick) -> np.ndarray:
        """Returns the state vector at a tick: (action_size,) float32, in the policy's units.

        Raises:
            NotReadyError: A JointState is missing or stale.
        """
        return self._buffer.state(tick.time_ns)

    def target(self, tick: Tick) -> np.ndarray | None:
        """Returns the action at a tick: the commands, or the measured state; None if unknown.

        Returns:
            (action_size,) float32, in the policy's units.
        """
        try:
            return self.state(tick) if self._commands is None else self._commands.at(tick.time_ns)[0]
        except NotReadyError:
            return None

    def decode(self, sample: Sample) -> Observation:
        """Decodes the images of a result of :meth:`select`, and returns the observation.

        Raises:
            ClpError: An image cannot be decoded.
        """
        return self._buffer.decode(sample.time_ns, sample.selected)

    def _pass(self) -> Tick:
        tick = Tick(self._tick_ns, self._begins)
        self._tick_ns, self._begins = self._tick_ns + self.embodiment.period_ns, False
        return tick
