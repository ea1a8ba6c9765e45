# SPDX-License-Identifier: Apache-2.0
"""A recorded episode as a training set sees it: observations on control ticks, each with the actions that followed."""

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
        observation: What the policy sees, and the stamp of each input.
        actions: (chunk, action_size) float32: the actions at its control tick and those that follow, in the policy's
            units. Their source is the embodiment's: the state measured a tick later, or the topics' commands.
        action_is_pad: (chunk,) bool: True after the episode's end or where the action is not known; ``actions`` repeats
            the last known one there, or the state.
        action_stamps: Stamp of the message that the first action comes from, nanoseconds, by topic; empty where it is
            the next state.
        piece: Number of the piece of the recording, from 0: a new one begins where all topics were silent for more than
            a second.
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
        commands: Likewise; empty where the action is the next state.
    """

    period_ns: int
    ticks: list[int] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    commands: list[np.ndarray] = field(default_factory=list)

    def add(self, tick_ns: int, state: np.ndarray, command: np.ndarray | None = None) -> None:
        """Takes the state at a tick, and the action where topics command it."""
        self.ticks.append(tick_ns)
        self.states.append(state)
        if command is not None:
            self.commands.append(command)

    @property
    def actions(self) -> list[np.ndarray]:
        """The action at each tick: the command, or the state at the next tick, where that one follows.

        The states, where no tick follows another.
        """
        if self.commands:
            return self.commands
        follows = np.diff(np.array(self.ticks, dtype=np.int64)) == self.period_ns
        return [self.states[index + 1] for index in np.flatnonzero(follows)] or self.states


class TickCounts:
    """What of an episode was not used.

    Attributes:
        usable: Number of control ticks at which every input, and the action, was there.
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
        """Takes the counts at an episode's end.

        Raises:
            ClpError: No tick could be used; it says why.
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
    for topic, kind in embodiment.demonstration_topics.items():
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


def replay(
    reader: BagReader, sampler: Sampler, listen: Mapping[str, Callable[[Message], None]] | None = None
) -> Iterator[Tick]:
    """Plays a bag into a sampler, and stops at every control tick: the sampler holds what had been received by then.

    Args:
        reader: The bag.
        sampler: Takes its messages.
        listen: Called with the messages of further topics, as they come; they pass no ticks.

    Raises:
        ClpError: See :meth:`Sampler.add`; it names the bag.
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
            raise ClpError(error.what, where=f"{reader.path}, {error.where}", fix=error.fix) from None
    yield from sampler.end()


def usable_ticks(
    reader: BagReader,
    embodiment: Embodiment,
    progress: Callable[[int], None] | None = None,
    steps: Steps | None = None,
) -> EpisodeTicks:
    """Finds the control ticks of an episode at which every input is there, and the action where topics command it.

    Decodes no image.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        progress: Called with each control tick, nanoseconds; what it raises ends the search.
        steps: Takes the state, and the commanded action, at each tick found.

    Raises:
        ClpError: The bag lacks a topic, its clock jumps, or no tick can be used; it says why.
    """
    check_topics(reader, embodiment)
    sampler, usable = Sampler(embodiment), []
    counts = TickCounts()
    for tick in replay(reader, sampler):
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
        fix="correct or loosen this topic in the embodiment, or record again",
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
    """Reads an episode frame by frame, in one pass over the bag: a frame for each control tick that can be used.

    Images are decoded when their frame is asked for, and at most ``chunk`` frames are held: memory does not grow with
    the bag, and a slow consumer slows the reading down.

    Args:
        reader: The episode.
        embodiment: The robot it was recorded with.
        chunk: Number of actions a frame carries.
        counts: Takes what was used and what was not, and is complete at the end.
        left_out: See :func:`read_frames`; by default a tenth of the bag's ticks may be left out.
        listen: Called with the messages of further topics, by topic, as they come in the same pass. A frame comes out
            up to ``chunk`` ticks after the messages that were received with it.

    Raises:
        ClpError: At once: the bag lacks a topic. While reading: its clock jumps; an image cannot be decoded, see
            :meth:`LeftOut.add`; or, at the end, no tick could be used.
    """
    check_topics(reader, embodiment)
    counts = TickCounts() if counts is None else counts
    left_out = LeftOut((reader.end_ns - reader.start_ns) // embodiment.period_ns + 1) if left_out is None else left_out
    return _frames(reader, embodiment, None, chunk, left_out, counts, listen)


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
    return _frames(reader, embodiment, ticks, chunk, LeftOut(len(ticks)) if left_out is None else left_out)


@dataclass
class _Pending:
    """A frame that waits for its actions."""

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
    """The frames at given ticks, or at all usable ones where ``ticks`` is None."""
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
        raise ValueError(f"tick {wanted[0]} is no control tick of {reader.path}")
    if counts is not None:
        counts.finish(reader, sampler, usable)


def make_frame(
    observation: Observation,
    known: Sequence[np.ndarray | None],
    chunk: int,
    action_stamps: Mapping[str, int] | None = None,
    piece: int = 0,
) -> Frame:
    """A frame of an observation and its actions, as far as they are known.

    Args:
        observation: What the policy sees.
        known: (action_size,) float32 a tick, None where the action is not known; may end early.
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
