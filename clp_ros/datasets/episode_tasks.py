# SPDX-License-Identifier: Apache-2.0
"""The task of each episode: given, from a topic, or from a column of a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from clp_ros.bags.names import absolute_topic
from clp_ros.bags.reader import BagReader, Message
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.datasets.episode_cuts import STRING, Listen, check_topic, read_csv
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.task import load_task

EPISODES_FILE, COLUMN = "episodes.csv", "instruction"
"""Beside the bags, as ``clp record --task`` writes it; and the column with the instruction."""

_CSV = re.compile(r"(?P<file>.+\.csv)(:(?P<column>[^:/]+))?")


class TaskSource:
    """Returns the tasks of one recording's episodes.

    Args:
        reader: The recording.
    """

    def __init__(self, reader: BagReader) -> None:
        self._reader = reader

    def listen(self) -> Listen:
        """Returns what to call with which topics' messages.

        Raises:
            ClpError: The recording lacks a topic.
        """
        return {}

    def task(self, begin_ns: int, end_ns: int, given: str | None) -> str:
        """Returns an episode's task, when all messages were heard.

        Args:
            begin_ns, end_ns: Its first and last tick.
            given: The task from the cut, if that gives one.

        Raises:
            ClpError: There is none.
        """
        raise NotImplementedError


class GivenTask(TaskSource):
    """One task for all episodes."""

    def __init__(self, reader: BagReader, text: str) -> None:
        super().__init__(reader)
        self._text = text

    def task(self, begin_ns: int, end_ns: int, given: str | None) -> str:
        """See :meth:`TaskSource.task`."""
        return self._text


class TopicTask(TaskSource):
    """The newest text of a std_msgs/String topic at an episode's begin, or else the first during the episode."""

    def __init__(self, reader: BagReader, topic: str) -> None:
        super().__init__(reader)
        self._topic = absolute_topic(topic)
        self._texts: list[tuple[int, str]] = []

    def listen(self) -> Listen:
        """See :meth:`TaskSource.listen`."""
        check_topic(self._reader, self._topic, (STRING,))
        return {self._topic: self._hear}

    def task(self, begin_ns: int, end_ns: int, given: str | None) -> str:
        """See :meth:`TaskSource.task`."""
        before = [text for time_ns, text in self._texts if time_ns <= begin_ns]
        during = [text for time_ns, text in self._texts if begin_ns < time_ns <= end_ns]
        if before or during:
            return before[-1] if before else during[0]
        seconds = (begin_ns - self._reader.start_ns) / 1e9
        raise ClpError(f"{self._topic} has no text for the episode at {seconds:.1f} s", where=self._reader.path)

    def _hear(self, message: Message) -> None:
        if text := message.data.data.strip():
            self._texts.append((message.receive_ns, text))


class FileTask(TaskSource):
    """The text in a recording's line of a CSV file with the columns ``bag`` and, by default, ``instruction``."""

    def __init__(self, reader: BagReader, files: TaskFiles, path: Path | None, column: str = COLUMN) -> None:
        super().__init__(reader)
        self._files, self._path, self._column = files, path, column

    def task(self, begin_ns: int, end_ns: int, given: str | None) -> str:
        """See :meth:`TaskSource.task`."""
        bag = self._reader.path.absolute()
        path = bag.parent / EPISODES_FILE if self._path is None else self._path
        if self._path is None and given is not None:
            return given
        if self._path is None and not path.is_file():
            hint = "give --task, or write episodes.csv with the columns bag and instruction beside the bags"
            raise ClpError("the bag has no task", where=self._reader.path, hint=hint)
        tasks = self._files.column(path, self._column)
        if not tasks.get(bag.name, ""):
            hint = did_you_mean(bag.name, list(tasks))
            raise ClpError(f"it has no {self._column} for the bag {bag.name}", where=path, hint=hint)
        return tasks[bag.name]


class TaskFiles:
    """The CSV files of one conversion. Each is read once."""

    def __init__(self) -> None:
        self._columns: dict[tuple[Path, str], dict[str, str]] = {}

    def column(self, path: Path, column: str) -> dict[str, str]:
        """Returns a column by bag.

        Raises:
            ClpError: See :func:`read_csv`.
        """
        if (path, column) not in self._columns:
            rows = read_csv(path, ("bag", column))
            self._columns[path, column] = {
                row["bag"].rstrip("/").rpartition("/")[2]: (row[column] or "").strip() for row in rows if row["bag"]
            }
        return self._columns[path, column]


def make_task_source(text: str | None, embodiment: Embodiment) -> Callable[[BagReader], TaskSource]:
    """Returns what gives a recording's tasks.

    Args:
        text: The name of a task, a YAML file, or an instruction (see :func:`load_task`); ``topic:NAME``;
            ``FILE.csv`` or ``FILE.csv:COLUMN``; None: ``episodes.csv`` beside each recording.
        embodiment: The robot.

    Raises:
        ClpError: There is no such task or file.
    """
    files = TaskFiles()
    if text is None:
        return lambda reader: FileTask(reader, files, None)
    if text.startswith("topic:"):
        return lambda reader: TopicTask(reader, text.removeprefix("topic:"))
    if (found := _CSV.fullmatch(text)) is not None:
        path, column = Path(found["file"]), found["column"] or COLUMN
        files.column(path, column)
        return lambda reader: FileTask(reader, files, path, column)
    instruction = load_task(text, embodiment).instruction
    return lambda reader: GivenTask(reader, instruction)
