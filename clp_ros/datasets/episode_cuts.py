# SPDX-License-Identifier: Apache-2.0
"""Where the episodes of a recording begin and end: one, or cut by marks, by silences, or at given times."""

from __future__ import annotations

import csv
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clp_ros.bags.names import absolute_topic
from clp_ros.bags.reader import BagReader, Message
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean

MIN_FRAMES = 2
"""Number of frames in the shortest episode."""

STRING, BOOL = "std_msgs/msg/String", "std_msgs/msg/Bool"
# Texts of a String that end an episode and begin none.
_ENDS = ("", "stop", "end")

Listen = Mapping[str, Callable[[Message], None]]


@dataclass(frozen=True)
class Window:
    """The time of an episode, on the clock of the receive stamps.

    Attributes:
        begin_ns: Its first nanosecond.
        end_ns: The first nanosecond after it.
        task: The instruction, if the cut gives one.
    """

    begin_ns: int
    end_ns: int
    task: str | None = None


@dataclass(frozen=True)
class PlannedEpisode:
    """An episode of a recording.

    Attributes:
        ticks: Its control ticks, one period apart: nanoseconds, int64.
        task: The instruction.
    """

    ticks: np.ndarray
    task: str

    @property
    def start_ns(self) -> int:
        """The first tick, nanoseconds."""
        return int(self.ticks[0])

    @property
    def end_ns(self) -> int:
        """The last tick, nanoseconds."""
        return int(self.ticks[-1])


class Cut(ABC):
    """Cuts one recording into episodes. It hears the recording's messages, and then gives the windows.

    Args:
        reader: The recording.
    """

    def __init__(self, reader: BagReader) -> None:
        self._begin_ns, self._end_ns = reader.start_ns, reader.end_ns + 1
        self._reader = reader

    def listen(self, topics: Sequence[str]) -> Listen:
        """Returns what to call with which topics' messages.

        Args:
            topics: The embodiment's topics.

        Raises:
            ClpError: The recording lacks a topic.
        """
        return {}

    @abstractmethod
    def windows(self) -> list[Window]:
        """Returns the episodes' windows in the order of time, when all messages were heard."""


class WholeBag(Cut):
    """One episode."""

    def windows(self) -> list[Window]:
        """See :meth:`Cut.windows`."""
        return [Window(self._begin_ns, self._end_ns)]


class Marks(Cut):
    """Episodes that a topic marks.

    std_msgs/Bool: an episode lasts while the newest value is true. std_msgs/String: each message begins an episode, and
    ends the one before; an empty text, ``stop`` or ``end`` begins none.
    """

    def __init__(self, reader: BagReader, topic: str) -> None:
        super().__init__(reader)
        self._topic = absolute_topic(topic)
        self._windows: list[Window] = []
        self._open_ns: int | None = None

    def listen(self, topics: Sequence[str]) -> Listen:
        """See :meth:`Cut.listen`."""
        check_topic(self._reader, self._topic, (STRING, BOOL))
        return {self._topic: self._hear}

    def windows(self) -> list[Window]:
        """See :meth:`Cut.windows`."""
        self._close(self._end_ns)
        if not self._windows:
            raise ClpError(f"no message of {self._topic} begins an episode", where=self._reader.path)
        return self._windows

    def _hear(self, message: Message) -> None:
        value = message.data.data
        if message.type == BOOL:
            begins = bool(value)
            if begins and self._open_ns is not None:
                return
        else:
            begins = value.strip().lower() not in _ENDS
        self._close(message.receive_ns)
        self._open_ns = message.receive_ns if begins else None

    def _close(self, end_ns: int) -> None:
        if self._open_ns is not None and end_ns > self._open_ns:
            self._windows.append(Window(self._open_ns, end_ns))
        self._open_ns = None


class Silences(Cut):
    """Episodes between times in which no message of the robot came."""

    def __init__(self, reader: BagReader, seconds: float) -> None:
        super().__init__(reader)
        self._least_ns = round(seconds * 1e9)
        self._newest_ns: int | None = None
        self._windows: list[Window] = []

    def listen(self, topics: Sequence[str]) -> Listen:
        """See :meth:`Cut.listen`."""
        return dict.fromkeys(topics, self._hear)

    def windows(self) -> list[Window]:
        """See :meth:`Cut.windows`."""
        return [*self._windows, Window(self._begin_ns, self._end_ns)]

    def _hear(self, message: Message) -> None:
        if self._newest_ns is not None and message.receive_ns - self._newest_ns >= self._least_ns:
            self._windows.append(Window(self._begin_ns, self._newest_ns + 1))
            self._begin_ns = message.receive_ns
        self._newest_ns = max(message.receive_ns, self._newest_ns or 0)


class Times(Cut):
    """Episodes that begin at given times."""

    def __init__(self, reader: BagReader, seconds: Sequence[float]) -> None:
        super().__init__(reader)
        self._begins = [self._begin_ns + round(second * 1e9) for second in seconds]

    def windows(self) -> list[Window]:
        """See :meth:`Cut.windows`."""
        begins = [begin for begin in self._begins if begin < self._end_ns]
        if not begins:
            raise ClpError("all given times are after its end", where=self._reader.path)
        return [Window(begin, end) for begin, end in zip(begins, [*begins[1:], self._end_ns], strict=True)]


class Table(Cut):
    """Episodes from a CSV file with the columns ``bag``, ``start`` and ``end``, seconds from the recording's start.

    A column ``instruction`` gives the tasks.
    """

    def __init__(self, reader: BagReader, rows: Sequence[Mapping[str, str]], path: Path) -> None:
        super().__init__(reader)
        self._rows, self._path = rows, path

    def windows(self) -> list[Window]:
        """See :meth:`Cut.windows`."""
        name = self._reader.path.absolute().name
        found = []
        for row in self._rows:
            if (row["bag"] or "").rstrip("/").rpartition("/")[2] != name:
                continue
            try:
                begin_s, end_s = float(row["start"]), float(row["end"])
            except (TypeError, ValueError):
                raise ClpError(f"start and end of {name} are not numbers", where=self._path) from None
            if not 0 <= begin_s < end_s:
                raise ClpError(f"an episode of {name} from {begin_s:g} to {end_s:g} s", where=self._path)
            begin_ns, end_ns = (self._begin_ns + round(second * 1e9) for second in (begin_s, end_s))
            found.append(Window(begin_ns, end_ns, (row.get("instruction") or "").strip() or None))
        if not found:
            raise ClpError(f"it has no episode of {name}", where=self._path)
        found.sort(key=lambda window: window.begin_ns)
        for one, after in itertools.pairwise(found):
            if after.begin_ns < one.end_ns:
                raise ClpError(f"two episodes of {name} overlap", where=self._path)
        return found


def make_cut(text: str) -> Callable[[BagReader], Cut]:
    """Returns what cuts a recording.

    Args:
        text: ``bag``, ``topic:NAME``, ``silence:SECONDS``, ``times:S1,S2,…``, or ``times:FILE.csv``.

    Raises:
        ClpError: It is none of these, or the file cannot be read.
    """
    kind, _, value = text.partition(":")
    if kind == "bag" and not value:
        return WholeBag
    if kind == "topic" and value:
        return lambda reader: Marks(reader, value)
    if kind == "silence":
        seconds = _numbers(value, text)
        if len(seconds) == 1 and seconds[0] > 0:
            return lambda reader: Silences(reader, seconds[0])
    if kind == "times" and value.endswith(".csv"):
        path = Path(value)
        rows = read_csv(path, ("bag", "start", "end"))
        return lambda reader: Table(reader, rows, path)
    if kind == "times":
        seconds = _numbers(value, text)
        if seconds and seconds[0] >= 0 and all(one < after for one, after in itertools.pairwise(seconds)):
            return lambda reader: Times(reader, seconds)
        raise ClpError(f"{value!r} are not ascending times in seconds", where=text)
    raise ClpError(
        f"{text!r} is no way to cut a recording",
        where="episodes_by",
        hint="write bag, topic:/NAME, silence:SECONDS, times:0,12.5,30 or times:FILE.csv",
    )


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads a CSV file with a header line.

    Raises:
        ClpError: The file cannot be read, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            for needed in columns:
                if needed not in names:
                    hint = did_you_mean(needed, names) if names else "write a header line"
                    raise ClpError(f"it has no column {needed!r}", where=path, hint=hint)
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClpError(f"the file cannot be read ({error})", where=path, hint="write CSV in UTF-8") from error


def check_topic(reader: BagReader, topic: str, types: Sequence[str]) -> None:
    """Refuses a recording without a topic of one of these types.

    Raises:
        ClpError: The topic is missing, unreadable or of another type.
    """
    found = reader.topics.get(topic)
    if found is None:
        hint = did_you_mean(topic, list(reader.topics))
        raise ClpError(f"topic {topic} is not in the bag", where=reader.path, hint=hint)
    reader.check_readable(topic)
    if found.type not in types:
        raise ClpError(f"topic {topic} has the type {found.type}, not {' or '.join(types)}", where=reader.path)


def split_at_gaps(ticks: np.ndarray, period_ns: int) -> list[np.ndarray]:
    """Splits ticks into runs of consecutive ones, because a dataset's frames are equally spaced in time."""
    if not len(ticks):
        return []
    return np.split(ticks, np.flatnonzero(np.diff(ticks) != period_ns) + 1)


def _numbers(text: str, where: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [float("nan")]
    if not np.isfinite(numbers).all():
        raise ClpError(f"{text!r} is not a number of seconds", where=where)
    return numbers
