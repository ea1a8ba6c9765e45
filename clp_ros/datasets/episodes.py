# SPDX-License-Identifier: Apache-2.0
"""A recorded episode as a training set sees it: observations on control ticks, each with the actions that followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from clp_ros.bags.reader import BagReader
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.messages.stamps import MAX_CLOCK_JUMP_NS
from clp_ros.robots.embodiment import Embodiment, type_advice
from clp_ros.robots.observation import NotReadyError, Observation, ObservationBuffer


@dataclass(frozen=True)
class Frame:
    """One frame of a calibration set.

    Attributes:
        observation: What the policy sees.
        actions: (chunk, action_size) float32: the joint positions at the control ticks that follow, in the policy's
            units, as demonstrations recorded without a leader arm define the action.
        action_is_pad: (chunk,) bool: True after the episode's end or where the state is not known; ``actions`` repeats
            the last known position there.
    """

    observation: Observation
    actions: np.ndarray
    action_is_pad: np.ndarray


class LeftOut:
    """Frames left out because an image of theirs cannot be decoded; many are an error.

    Args:
        frames: Number of frames drawn, over all episodes. A tenth of them may be left out, and one in any case but the
            only one.

    Attributes:
        dropped: Number of frames left out, by "topic: reason".
    """

    def __init__(self, frames: int) -> None:
        self.dropped: Counter[str] = Counter()
        self._frames = frames

    def add(self, error: ClpError, where: object | None = None) -> None:
        """Leaves a frame out.

        Args:
            error: Why its image cannot be decoded.
            where: The recording.

        Raises:
            ClpError: Too many are; it says why.
        """
        self.dropped[f"{error.where}: {error.what}"] += 1
        count = self.dropped.total()
        if count > max(self._frames // 10, min(1, self._frames - 1)):
            what = f"{count} of {self._frames} frames cannot be decoded: " if count > 1 else ""
            place = error.where if where is None else f"{where}, {error.where}"
            raise ClpError(what + error.what, where=place, fix=error.fix) from error


@dataclass
class Steps:
    """The states at an episode's usable control ticks, for statistics over all of them.

    Attributes:
        period_ns: Time between control ticks, nanoseconds.
        ticks: Ascending within an episode, nanoseconds.
        states: (action_size,) float32 a tick, in the policy's units.
    """

    period_ns: int
    ticks: list[int] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)

    def add(self, tick_ns: int, state: np.ndarray) -> None:
        """Takes the state at a tick."""
        self.ticks.append(tick_ns)
        self.states.append(state)

    @property
    def actions(self) -> list[np.ndarray]:
        """The action at each tick that the next one follows: the state there. The states where no tick follows."""
        follows = np.diff(np.array(self.ticks, dtype=np.int64)) == self.period_ns
        return [self.states[index + 1] for index in np.flatnonzero(follows)] or self.states


@dataclass
class EpisodeTicks:
    """What one pass over an episode found.

    Attributes:
        usable: Control ticks at which every input is there, nanoseconds, int64.
        unusable: Number of control ticks that cannot be used, by "topic: reason".
        dropped: Number of messages not used, by "topic: reason".
    """

    usable: np.ndarray
    unusable: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def check_topics(reader: BagReader, embodiment: Embodiment) -> None:
    """Refuses a bag that lacks one of an embodiment's topics, or has it with another type or nothing that can be read.

    Other topics do not matter, whatever they hold.

    Raises:
        ClpError: It does; it names the topic.
    """
    for topic, kind in embodiment.topics.items():
        found = reader.topics.get(topic)
        if found is None:
            raise ClpError(
                f"topic {topic} is not in the bag", where=reader.path, fix=did_you_mean(topic, list(reader.topics))
            )
        reader.check_readable(topic)
        if found.type != kind:
            raise ClpError(
                f"topic {topic} is a {found.type}, the embodiment says {kind}",
                where=reader.path,
                fix=type_advice(kind, found.type),
            )
        if not found.count:
            raise ClpError(f"topic {topic} has no messages", where=reader.path, fix="record it again")


def control_ticks(reader: BagReader, buffer: ObservationBuffer) -> Iterator[tuple[int, bool]]:
    """Replays a bag into a buffer, and stops at every control tick: the buffer holds what had been received by then.

    Where all topics are silent for more than a second (the recording was paused, or its clock jumped) there are no
    ticks: the buffer starts anew after it.

    Yields:
        The tick, nanoseconds, and whether it is the first after a silence or of the bag.
    """
    tick = newest = None
    begins = True
    for message in reader.messages(list(buffer.embodiment.topics)):
        if newest is None or message.receive_ns - newest > MAX_CLOCK_JUMP_NS:
            if tick is not None:
                yield tick, begins
            buffer.forget()
            tick, begins = message.receive_ns, True
        newest = message.receive_ns
        while tick < newest:
            yield tick, begins
            tick, begins = tick + buffer.embodiment.period_ns, False
        try:
            buffer.add(message.topic, message.data, message.receive_ns)
        except ClpError as error:
            raise ClpError(error.what, where=f"{reader.path}, {error.where}", fix=error.fix) from None
    if tick is not None:
        yield tick, begins


def usable_ticks(
    reader: BagReader,
    embodiment: Embodiment,
    progress: Callable[[int], None] | None = None,
    steps: Steps | None = None,
) -> EpisodeTicks:
    """Finds the control ticks of an episode at which every input is there. Decodes no image.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        progress: Called with each control tick, nanoseconds; what it raises ends the search.
        steps: Takes the state at each tick found.

    Raises:
        ClpError: The bag lacks a topic, its clock jumps, or no tick can be used; it says why.
    """
    check_topics(reader, embodiment)
    buffer = ObservationBuffer(embodiment)
    usable: list[int] = []
    unusable: Counter[str] = Counter()
    reasons: dict[str, NotReadyError] = {}
    for tick, _ in control_ticks(reader, buffer):
        if progress is not None:
            progress(tick)
        try:
            buffer.select(tick)
        except NotReadyError as missing:
            kind = f"{missing.topic}: {missing.kind}"
            unusable[kind] += 1
            reasons[kind] = missing
        else:
            usable.append(tick)
            if steps is not None:
                steps.add(tick, buffer.state(tick))
    dropped = Counter({(topic, "cannot be deserialized"): count for topic, count in reader.dropped.items() if count})
    dropped += buffer.dropped
    if not usable:
        raise _no_tick(reader, embodiment, reasons[unusable.most_common(1)[0][0]] if unusable else None, dropped)
    return EpisodeTicks(
        np.array(usable, dtype=np.int64),
        unusable,
        Counter({f"{topic}: {reason}": count for (topic, reason), count in dropped.items()}),
    )


def _no_tick(
    reader: BagReader, embodiment: Embodiment, missing: NotReadyError | None, dropped: Counter[tuple[str, str]]
) -> ClpError:
    topic = next(iter(embodiment.topics)) if missing is None else missing.topic
    reason = "no message can be read" if missing is None else missing.reason
    why = [(count, reason) for (name, reason), count in dropped.items() if name == topic]
    if why:
        count, most = max(why)
        reason += f"; {count} of its messages are not used: {most}"
    return ClpError(
        f"no control tick has all inputs: {reason}",
        where=f"{reader.path}, {topic}",
        fix="correct or loosen this topic in the embodiment, or record again",
    )


def read_frames(
    reader: BagReader, embodiment: Embodiment, ticks: Sequence[int], chunk: int, left_out: LeftOut | None = None
) -> Iterator[Frame]:
    """Reads the frames at given control ticks, in their order. Holds at most ``chunk`` steps of the bag at a time.

    A frame with an image that cannot be decoded is left out, where these are few.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        ticks: Ascending control ticks that :func:`usable_ticks` found, nanoseconds.
        chunk: Number of actions a frame carries.
        left_out: Counts the frames left out, over all episodes that are given it; by default those of this one.

    Raises:
        ClpError: See :meth:`LeftOut.add`.
        ValueError: A tick is none that :func:`usable_ticks` found.
    """
    wanted = iter(ticks)
    next_tick = next(wanted, None)
    left_out = LeftOut(len(ticks)) if left_out is None else left_out
    buffer = ObservationBuffer(embodiment)
    pending: list[tuple[Observation, list[np.ndarray | None]]] = []
    for tick, begins in control_ticks(reader, buffer):
        if begins:
            while pending:
                yield make_frame(*pending.pop(0), chunk)
        if pending:
            try:
                state = buffer.state(tick)
            except NotReadyError:
                state = None
            for _, actions in pending:
                actions.append(state)
            while pending and len(pending[0][1]) == chunk:
                yield make_frame(*pending.pop(0), chunk)
        if tick == next_tick:
            next_tick = next(wanted, None)
            try:
                pending.append((buffer.observe(tick), []))
            except NotReadyError as missing:
                raise ValueError(f"tick {tick} cannot be used: {missing}") from missing
            except ClpError as error:
                left_out.add(error, reader.path)
        if next_tick is None and not pending:
            return
    for observation, actions in pending:
        yield make_frame(observation, actions, chunk)
    if next_tick is not None:
        raise ValueError(f"tick {next_tick} is no control tick of {reader.path}")


def make_frame(observation: Observation, known: list[np.ndarray | None], chunk: int) -> Frame:
    """A frame of an observation and the states at the ticks after it, as far as they are known.

    Args:
        observation: What the policy sees.
        known: (action_size,) float32 a tick, None where the state is not known; may end early.
        chunk: Number of actions a frame carries.
    """
    actions = np.empty((chunk, len(observation.state)), dtype=np.float32)
    is_pad = np.ones(chunk, dtype=bool)
    last = observation.state
    for step in range(chunk):
        state = known[step] if step < len(known) else None
        is_pad[step] = state is None
        last = last if state is None else state
        actions[step] = last
    return Frame(observation, actions, is_pad)
