# SPDX-License-Identifier: Apache-2.0
"""Reads recorded episodes as training data: observations on control ticks with the following actions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from clp_ros.bags.reader import BagReader, Message
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.datasets.sampler import Sampler, Tick
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, Observation
from clp_ros.robots.topics import type_advice


@dataclass(frozen=True)
class Frame:
    """One frame of an episode.

    Attributes:
        observation: The policy's inputs, and the stamp of each.
        actions: (chunk, action_size) float32: the actions from its control tick on, in the policy's units. Their source
            is that of the embodiment: the state measured a tick later, or the topics' commands.
        action_is_pad: (chunk,) bool: True after the episode's end, or for an unknown action. There, ``actions`` repeats
            the last known action, or the state.
        action_stamps: Stamps of the messages of the first action, nanoseconds, by topic; empty if it is the next state.
        piece: Number of the piece of the recording, from 0. A new piece begins after a second without messages on any
            topic.
    """

    observation: Observation
    actions: np.ndarray
    action_is_pad: np.ndarray
    action_stamps: Mapping[str, int] = field(default_factory=dict)
    piece: int = 0

    @property
    def action(self) -> np.ndarray:
        """The first action: (action_size,) float32."""
        return self.actions[0]


class LeftOut:
    """Counts the frames that are left out because an image cannot be decoded. Too many are an error.

    Args:
        frames: Number of frames drawn, over all episodes. A tenth of them may be left out, and one if there are two or
            more.

    Attributes:
        dropped: Number of frames left out, by "topic: reason".
    """

    def __init__(self, frames: int) -> None:
        self.dropped: Counter[str] = Counter()
        self._frames = frames

    def add(self, error: ClpError, where: object | None = None) -> None:
        """Leaves a frame out.

        Args:
            error: The reason why its image cannot be decoded.
            where: The recording.

        Raises:
            ClpError: Too many frames are left out.
        """
        self.dropped[f"{error.where}: {error.what}"] += 1
        count = self.dropped.total()
        if count > max(self._frames // 10, min(1, self._frames - 1)):
            what = f"{count} of {self._frames} frames cannot be decoded: " if count > 1 else ""
            place = error.where if where is None else f"{where}, {error.where}"
            raise error.at(place, before=what) from error


@dataclass
class Steps:
    """Collects the states at an episode's usable control ticks, for statistics.

    Attributes:
        period_ns: Time between control ticks, nanoseconds.
        ticks: Ascending within an episode, nanoseconds.
        states: (action_size,) float32 for each tick, in the policy's units.
        commands: As ``states``; empty if the action is the next state.
    """

    period_ns: int
    ticks: list[int] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    commands: list[np.ndarray] = field(default_factory=list)

    def add(self, tick_ns: int, state: np.ndarray, command: np.ndarray | None = None) -> None:
        """Adds the state at a tick, and the action if topics command it."""
        self.ticks.append(tick_ns)
        self.states.append(state)
        if command is not None:
            self.commands.append(command)

    @property
    def actions(self) -> list[np.ndarray]:
        """Returns the action at each tick: the command, or the state at the next tick if the next tick is usable.

        If no two ticks are consecutive, returns the states.
        """
        if self.commands:
            return self.commands
        follows = np.diff(np.array(self.ticks, dtype=np.int64)) == self.period_ns
        return [self.states[index + 1] for index in np.flatnonzero(follows)] or self.states


class TickCounts:
    """Counts the used and unused ticks and messages of an episode.

    Attributes:
        usable: Number of control ticks with all inputs and the action.
        unusable: Number of control ticks that cannot be used, by "topic: reason".
        dropped: Number of messages not used, by "topic: reason".
    """

    def __init__(self) -> None:
        self.usable = 0
        self.unusable: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._reasons: dict[str, NotReadyError] = {}

    def leave_out(self, missing: NotReadyError) -> None:
        """Counts a tick that cannot be used."""
        kind = f"{missing.topic}: {missing.kind}"
        self.unusable[kind] += 1
        self._reasons[kind] = missing

    def finish(self, reader: BagReader, sampler: Sampler, usable: int) -> None:
        """Completes the counts at an episode's end.

        Raises:
            ClpError: No tick could be used. The message has the most frequent reason.
        """
        dropped = Counter(
            {(topic, "cannot be deserialized"): count for topic, count in reader.dropped.items() if count}
        )
        dropped += sampler.dropped
        self.usable = usable
        self.dropped = Counter({f"{topic}: {reason}": count for (topic, reason), count in dropped.items()})
        if not usable:
            missing = self._reasons[self.unusable.most_common(1)[0][0]] if self.unusable else None
            raise _no_tick(reader, sampler.embodiment, missing, dropped)


@dataclass
class EpisodeTicks:
    """The control ticks found in one pass over an episode.

    Attributes:
        usable: Control ticks with all inputs, nanoseconds, int64.
        unusable: Number of control ticks that cannot be used, by "topic: reason".
        dropped: Number of messages not used, by "topic: reason".
    """

    usable: np.ndarray
    unusable: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def check_topics(reader: BagReader, embodiment: Embodiment) -> None:
    """Refuses a bag in which a topic of the embodiment is missing, unreadable or of another type.

    Other topics are ignored.

    Raises:
        ClpError: A topic is missing, unreadable or of another type. The message names it.
    """
    for topic, kind in embodiment.demonstration_topics.items():
        found = reader.topics.get(topic)
        if found is None:
            raise ClpError(
                f"topic {topic} is not in the bag", where=reader.path, hint=did_you_mean(topic, list(reader.topics))
            )
        reader.check_readable(topic)
        if found.type != kind:
            raise ClpError(
                f"topic {topic} has the type {found.type}, but the embodiment needs {kind}",
                where=reader.path,
                hint=type_advice(kind, found.type),
            )
        if not found.count:
            raise ClpError(f"topic {topic} has no messages", where=reader.path, hint="record it again")


def replay(
    reader: BagReader, sampler: Sampler, listen: Mapping[str, Callable[[Message], None]] | None = None
) -> Iterator[Tick]:
    """Adds a bag's messages to a sampler, and yields every control tick, when all messages received by then are added.

    Args:
        reader: The bag.
        sampler: The sampler.
        listen: Called with the messages of further topics, which cause no ticks.

    Raises:
        ClpError: See :meth:`Sampler.add`. The message names the bag.
    """
    topics, listen = sampler.embodiment.demonstration_topics, listen or {}
    for message in reader.messages([*topics, *listen]):
        if message.topic in listen:
            listen[message.topic](message)
        if message.topic not in topics:
            continue
        yield from sampler.ticks_before(message.receive_ns)
        try:
            sampler.add(message.topic, message.data, message.receive_ns)
        except ClpError as error:
            raise error.at(f"{reader.path}, {error.where}") from None
    yield from sampler.end()


def usable_ticks(
    reader: BagReader,
    embodiment: Embodiment,
    progress: Callable[[int], None] | None = None,
    steps: Steps | None = None,
    listen: Mapping[str, Callable[[Message], None]] | None = None,
) -> EpisodeTicks:
    """Finds the control ticks of an episode with all inputs, and with the action if topics command it.

    Decodes no image.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        progress: Called with each control tick, nanoseconds. An exception that it raises ends the search.
        steps: Collects the state, and the commanded action, at each tick found.
        listen: By topic, called with the messages of a topic in the same pass.

    Raises:
        ClpError: The bag lacks a topic, its clock jumps, or no tick can be used.
    """
    check_topics(reader, embodiment)
    sampler, usable = Sampler(embodiment), []
    counts = TickCounts()
    for tick in replay(reader, sampler, listen):
        if progress is not None:
            progress(tick.time_ns)
        try:
            sampler.select(tick)
        except NotReadyError as missing:
            counts.leave_out(missing)
            continue
        usable.append(tick.time_ns)
        if steps is not None:
            steps.add(tick.time_ns, sampler.state(tick), sampler.target(tick) if sampler.commanded else None)
    counts.finish(reader, sampler, len(usable))
    return EpisodeTicks(np.array(usable, dtype=np.int64), counts.unusable, counts.dropped)


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
        hint="correct or loosen this topic in the embodiment, or record again",
    )


def read_episode(
    reader: BagReader,
    embodiment: Embodiment,
    chunk: int = 1,
    *,
    counts: TickCounts | None = None,
    left_out: LeftOut | None = None,
    listen: Mapping[str, Callable[[Message], None]] | None = None,
) -> Iterator[Frame]:
    """Reads an episode frame by frame in one pass over the bag, one frame for each usable control tick.

    Images are decoded on demand, and at most ``chunk`` frames are kept: memory does not grow with the bag, and reading
    is as slow as the consumer.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        chunk: Number of actions a frame carries.
        counts: Counts used and unused ticks and messages; complete at the end.
        left_out: See :func:`read_frames`; by default a tenth of the bag's ticks may be left out.
        listen: By topic, called with the messages of further topics in the same pass. A frame is yielded up to
            ``chunk`` ticks after the messages received at its time.

    Raises:
        ClpError: At the call, the bag lacks a topic. While reading, its clock jumps, or too many images cannot be
            decoded (see :meth:`LeftOut.add`). At the end, no tick could be used.
    """
    check_topics(reader, embodiment)
    counts = TickCounts() if counts is None else counts
    left_out = LeftOut((reader.end_ns - reader.start_ns) // embodiment.period_ns + 1) if left_out is None else left_out
    return _frames(reader, embodiment, None, chunk, left_out, counts, listen)


def read_frames(
    reader: BagReader, embodiment: Embodiment, ticks: Sequence[int], chunk: int, left_out: LeftOut | None = None
) -> Iterator[Frame]:
    """Reads the frames at given control ticks, in their order, with at most ``chunk`` steps of the bag in memory.

    Frames with an image that cannot be decoded are left out, unless there are too many.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        ticks: Ascending control ticks that :func:`usable_ticks` found, nanoseconds.
        chunk: Number of actions a frame carries.
        left_out: Counts the frames left out; may be shared by several episodes. By default, those of this episode.

    Raises:
        ClpError: See :meth:`LeftOut.add`.
        ValueError: A tick is not one of those from :func:`usable_ticks`.
    """
    return _frames(reader, embodiment, ticks, chunk, LeftOut(len(ticks)) if left_out is None else left_out)


@dataclass
class _Pending:
    """A frame whose actions are not yet complete."""

    observation: Observation
    action_stamps: Mapping[str, int]
    piece: int
    known: list[np.ndarray | None] = field(default_factory=list)

    def frame(self, chunk: int) -> Frame:
        return make_frame(self.observation, self.known, chunk, self.action_stamps, self.piece)


def _frames(
    reader: BagReader,
    embodiment: Embodiment,
    ticks: Sequence[int] | None,
    chunk: int,
    left_out: LeftOut,
    counts: TickCounts | None = None,
    listen: Mapping[str, Callable[[Message], None]] | None = None,
) -> Iterator[Frame]:
    """Yields the frames at given ticks; if ``ticks`` is None, at all usable ones."""
    wanted = None if ticks is None else deque(ticks)
    sampler = Sampler(embodiment)
    pending: deque[_Pending] = deque()
    usable = 0

    def observe(tick: Tick) -> None:
        nonlocal usable
        if wanted is not None:
            if not wanted or tick.time_ns != wanted[0]:
                return
            wanted.popleft()
        try:
            sample = sampler.select(tick)
            usable += 1
            pending.append(_Pending(sampler.decode(sample), sample.action_stamps, sampler.pieces - 1))
        except NotReadyError as missing:
            if counts is None:
                raise ValueError(f"tick {tick.time_ns} cannot be used: {missing}") from missing
            counts.leave_out(missing)
        except ClpError as error:
            left_out.add(error, reader.path)

    for tick in replay(reader, sampler, listen):
        while tick.begins and pending:
            yield pending.popleft().frame(chunk)
        # A command belongs to its own tick, a measured state to the tick before it.
        if sampler.commanded:
            observe(tick)
        if pending:
            target = sampler.target(tick)
            for one in pending:
                one.known.append(target)
            while pending and len(pending[0].known) == chunk:
                yield pending.popleft().frame(chunk)
        if not sampler.commanded:
            observe(tick)
        if wanted is not None and not wanted and not pending:
            return
    while pending:
        yield pending.popleft().frame(chunk)
    if wanted:
        raise ValueError(f"tick {wanted[0]} is not a control tick of {reader.path}")
    if counts is not None:
        counts.finish(reader, sampler, usable)


def make_frame(
    observation: Observation,
    known: Sequence[np.ndarray | None],
    chunk: int,
    action_stamps: Mapping[str, int] | None = None,
    piece: int = 0,
) -> Frame:
    """Creates a frame from an observation and its known actions.

    Args:
        observation: The policy's inputs.
        known: (action_size,) float32 for each tick, or None for an unknown action; may be shorter than the chunk.
        chunk: Number of actions a frame carries.
        action_stamps: See :class:`Frame`.
        piece: See :class:`Frame`.
    """
    actions = np.empty((chunk, len(observation.state)), dtype=np.float32)
    is_pad = np.ones(chunk, dtype=bool)
    last = observation.state
    for step in range(chunk):
        action = known[step] if step < len(known) else None
        is_pad[step] = action is None
        last = last if action is None else action
        actions[step] = last
    return Frame(observation, actions, is_pad, dict(action_stamps or {}), piece)
