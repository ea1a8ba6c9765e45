# SPDX-License-Identifier: Apache-2.0
"""Frames drawn from a live robot: a stream of unknown length, in bounded memory."""

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
    """A drawn control tick; its images stay as they came in until the end (a JPEG is a twentieth of its pixels)."""

    sample: Sample
    piece: int
    actions: list[np.ndarray | None] = field(default_factory=list)


class FrameReservoir:
    """Draws frames from messages as they come, each usable control tick as likely as any other (Algorithm R).

    Ticks, observations and actions are those of :mod:`clp_ros.datasets.episodes`: a bag played into this gives the
    frames that reading the bag gives. Not thread-safe.

    Args:
        embodiment: The robot.
        samples: Number of frames to draw, and the most that are held.
        chunk: Number of actions a frame carries.
        seed: Seed of the draw.
        keep_states: Whether the state at every usable tick is kept (10 MB an hour), for statistics.

    Attributes:
        messages: Number of messages taken, by topic.
        usable: Number of control ticks at which every input was there.
        unusable: Number of control ticks that could not be used, by "topic: reason".
        steps: The states at all usable ticks, where they are kept.
    """

    def __init__(
        self, embodiment: Embodiment, samples: int, chunk: int, seed: int = 0, keep_states: bool = False
    ) -> None:
        if samples < 1:
            raise ClpError(f"samples is {samples}", fix="calibrate on at least one frame")
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
        self._open: list[_Drawn] = []  # those of _drawn that still wait for actions

    @property
    def episodes(self) -> int:
        """Number of episodes begun: one, and one more after every jump of the clock."""
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
        """Takes one message in, after the control ticks that passed before it.

        A receive stamp more than a second before or after the last one begins a new episode: a bag was played again,
        or the robot was silent.

        Raises:
            ClpError: See :meth:`Sampler.add`.
        """
        for tick in self._sampler.ticks_before(receive_ns):
            self._take(tick)
        self._sampler.add(topic, message, receive_ns)
        self.messages[topic] += 1

    def end_episode(self) -> None:
        """Ends the episode: frames that still wait for actions get no more."""
        for tick in self._sampler.end():
            self._take(tick)
        self._open.clear()

    def frames(self) -> Iterator[Frame]:
        """Ends the episode and yields the drawn frames in the order they came, each decoded when it is its turn.

        A frame with an image that cannot be decoded is left out, where these are few.

        Raises:
            ClpError: There is none, with the most frequent reason; or too many cannot be decoded.
        """
        self.end_episode()
        if not self._drawn:
            silent = [topic for topic in self.embodiment.demonstration_topics if not self.messages[topic]]
            reason = silent[0] if silent else (self.unusable.most_common(1) or [(self.embodiment.name, 0)])[0][0]
            raise ClpError(
                "a topic is silent" if silent else "no control tick has all inputs",
                where=reason,
                fix="check its name and publisher" if silent else "loosen that topic's sync in the embodiment",
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
            # Dropped and appended, not replaced in place: the list stays in the order of time.
            replaced = self._drawn.pop(place)
            self._open = [drawn for drawn in self._open if drawn is not replaced]
        drawn = _Drawn(sample, self.episodes - 1)
        self._drawn.append(drawn)
        self._open.append(drawn)
