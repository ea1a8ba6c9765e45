# SPDX-License-Identifier: Apache-2.0
"""Draws frames from a live robot: a stream of unknown length, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import Frame, LeftOut, Steps, make_frame
from clp_ros.datasets.sampler import Sample, Sampler, Tick
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError


@dataclass
class _Drawn:
    """A drawn control tick. Its images are decoded at the end, because a JPEG has a twentieth of the size of its
    pixels."""

    sample: Sample
    piece: int
    actions: list[np.ndarray | None] = field(default_factory=list)


class FrameReservoir:
    """Draws frames from arriving messages; all usable control ticks have the same probability (Algorithm R).

    Ticks, observations and actions are those of :mod:`clp_ros.datasets.episodes`: playing a bag gives the same frames
    as reading it. Not thread-safe.

    Args:
        embodiment: The robot.
        samples: Number of frames to draw, and the maximum number kept.
        chunk: Number of actions a frame carries.
        seed: Seed of the draw.
        keep_states: Whether to keep the state at every usable tick for statistics (10 MB an hour).

    Attributes:
        messages: Number of messages received, by topic.
        usable: Number of control ticks with all inputs.
        unusable: Number of control ticks that could not be used, by "topic: reason".
        steps: The states at all usable ticks, if they are kept.
    """

    def __init__(
        self, embodiment: Embodiment, samples: int, chunk: int, seed: int = 0, keep_states: bool = False
    ) -> None:
        if samples < 1:
            raise ClpError(f"the number is {samples}", where="samples", hint="calibrate on at least one frame")
        self.embodiment = embodiment
        self.samples = samples
        self.messages: Counter[str] = Counter()
        self.usable = 0
        self.unusable: Counter[str] = Counter()
        self.steps = Steps(embodiment.period_ns) if keep_states else None
        self._chunk = chunk
        self._rng = np.random.default_rng(seed)
        self._sampler = Sampler(embodiment)
        self._drawn: list[_Drawn] = []
        self._left_out = LeftOut(samples)
        self._open: list[_Drawn] = []  # the entries of _drawn whose actions are not yet complete

    @property
    def episodes(self) -> int:
        """Number of episodes begun. Every jump of the clock begins another."""
        return self._sampler.pieces

    @property
    def held(self) -> int:
        """Number of frames drawn so far."""
        return len(self._drawn)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of messages not used, and of frames whose images could not be decoded, by "topic: reason"."""
        messages = {f"{topic}: {reason}": count for (topic, reason), count in self._sampler.dropped.items()}
        return messages | self._left_out.dropped

    def add(self, topic: str, message: Any, receive_ns: int) -> None:
        """Adds one message, after the control ticks that passed before it.

        A receive stamp more than a second before or after the last one begins a new episode: a bag was played again, or
        there were no messages.

        Raises:
            ClpError: See :meth:`Sampler.add`.
        """
        for tick in self._sampler.ticks_before(receive_ns):
            self._take(tick)
        self._sampler.add(topic, message, receive_ns)
        self.messages[topic] += 1

    def end_episode(self) -> None:
        """Ends the episode. Frames without complete actions get no more."""
        for tick in self._sampler.end():
            self._take(tick)
        self._open.clear()

    def frames(self) -> Iterator[Frame]:
        """Ends the episode, and yields the drawn frames in the order of time. Each is decoded when it is yielded.

        Frames with an image that cannot be decoded are left out, unless there are too many.

        Raises:
            ClpError: There is no frame (with the most frequent reason), or too many cannot be decoded.
        """
        self.end_episode()
        if not self._drawn:
            silent = [topic for topic in self.embodiment.demonstration_topics if not self.messages[topic]]
            if silent:
                raise ClpError("no message came", where=silent[0], hint="check the topic's name and publisher")
            # A key of `unusable` is "topic: reason".
            most = self.unusable.most_common(1)
            topic, _, reason = most[0][0].partition(": ") if most else (self.embodiment.name, "", "no tick was drawn")
            raise ClpError(
                f"no control tick has all inputs: {reason}",
                where=topic,
                hint="loosen the topic's sync in the embodiment",
            )
        self._left_out = LeftOut(len(self._drawn))
        for drawn in self._drawn:
            try:
                observation = self._sampler.decode(drawn.sample)
            except ClpError as error:
                self._left_out.add(error)
                continue
            yield make_frame(observation, drawn.actions, self._chunk, drawn.sample.action_stamps, drawn.piece)

    def _take(self, tick: Tick) -> None:
        if tick.begins:
            self._open.clear()
        # A command belongs to its own tick, a measured state to the tick before it.
        if self._sampler.commanded:
            self._draw(tick)
        if self._open:
            target = self._sampler.target(tick)
            for drawn in self._open:
                drawn.actions.append(target)
            self._open = [drawn for drawn in self._open if len(drawn.actions) < self._chunk]
        if not self._sampler.commanded:
            self._draw(tick)

    def _draw(self, tick: Tick) -> None:
        try:
            sample = self._sampler.select(tick)
        except NotReadyError as missing:
            self.unusable[f"{missing.topic}: {missing.kind}"] += 1
            return
        self.usable += 1
        if self.steps is not None:
            command = self._sampler.target(tick) if self._sampler.commanded else None
            self.steps.add(tick.time_ns, self._sampler.state(tick), command)
        if len(self._drawn) == self.samples:
            place = int(self._rng.integers(self.usable))
            if place >= self.samples:
                return
            # A replaced entry is removed and the new one appended, so that the list stays in the order of time.
            replaced = self._drawn.pop(place)
            self._open = [drawn for drawn in self._open if drawn is not replaced]
        drawn = _Drawn(sample, self.episodes - 1)
        self._drawn.append(drawn)
        self._open.append(drawn)
