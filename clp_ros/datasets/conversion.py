# SPDX-License-Identifier: Apache-2.0
"""Converts recordings into a LeRobotDataset, part by part, so that an interrupted conversion can be continued.

Each part is a whole dataset in the folder ``OUTPUT.parts``, written in one step. At the end, the parts are joined.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.bags.reader import BagReader, Message, open_bag
from clp_ros.core.errors import ClpError
from clp_ros.datasets.conversion_log import ConversionLog, ConvertedEpisode
from clp_ros.datasets.dataset_check import DatasetReader, check_dataset
from clp_ros.datasets.dataset_features import FrameFormat
from clp_ros.datasets.dataset_folder import dataset_folder, join_datasets, write_log
from clp_ros.datasets.dataset_writer import DatasetWriter
from clp_ros.datasets.encoder_options import encoder_arguments
from clp_ros.datasets.episode_cuts import MIN_FRAMES, Listen, PlannedEpisode, make_cut, split_at_gaps
from clp_ros.datasets.episode_tasks import make_task_source
from clp_ros.datasets.episodes import Frame, read_frames, usable_ticks

# A part ends after this size of uncompressed pictures: about a minute of work.
_PART_BYTES = 2 << 30
# Exists in the folder of parts if these are to replace the output.
_REPLACES = "replaces_output"

# The shortest piece beside a gap that becomes an episode.
_SHORTEST_PIECE_NS = 5 * 10**8


@dataclass(frozen=True)
class ConversionSettings:
    """How recordings are converted.

    Attributes:
        frames: How frames are stored; its embodiment's control rate is the dataset's frame rate.
        encoder: Options of LeRobot's video encoder.
        episodes_by: How recordings are cut: see :func:`make_cut`.
    """

    frames: FrameFormat
    encoder: Mapping[str, Any] = field(default_factory=dict)
    episodes_by: str = "bag"

    def document(self) -> dict[str, Any]:
        """Returns the settings as a JSON object. A dataset is continued with the same settings only."""
        frames = self.frames
        return {
            "embodiment": frames.embodiment.model_dump(mode="json"),
            "video": frames.video,
            "size": None if frames.size is None else list(frames.size),
            "stamps": frames.stamps,
            "encoder": dict(self.encoder),
            "episodes_by": self.episodes_by,
        }


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        log: The dataset's log; None if no recording could be converted.
        episodes: Those that this run added.
        left_out: Why a recording was left out, by its path.
        notes: Sentences for the user.
    """

    log: ConversionLog | None = None
    episodes: list[ConvertedEpisode] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Converter:
    """Converts recordings into a dataset.

    Raises:
        ClpError: The settings or the task are wrong.

    Args:
        output: The dataset's folder.
        settings: How.
        task: Where the tasks come from: see :func:`make_task_source`.
        progress: Called with the seconds of recordings done, and in total.
    """

    def __init__(
        self,
        output: Path,
        settings: ConversionSettings,
        task: str | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.output = output
        self.parts = output.with_name(f"{output.name}.parts")
        encoder_arguments(settings.encoder)  # refused now, not after the first bag
        self._settings, self._progress = settings, progress
        self._cut, self._tasks = make_cut(settings.episodes_by), make_task_source(task, settings.frames.embodiment)
        self._done_s = self._total_s = 0
        self._part: _Part | None = None
        self._logs: list[ConversionLog] = []

    def run(self, bags: Sequence[Path], overwrite: bool = False) -> Conversion:
        """Converts the recordings that are not yet in the dataset or its parts.

        Args:
            bags: The recordings.
            overwrite: Whether an earlier dataset, and its parts, are replaced.

        Raises:
            ClpError: The output is another folder, or was made with other settings.
            RuntimeError: A written dataset is not what was to be written.
        """
        if overwrite:
            shutil.rmtree(self.parts, ignore_errors=True)
            self._mark_replacement()
        earlier = self._earlier()
        self._logs = [ConversionLog.read(root) for root in earlier]
        conversion = Conversion()
        try:
            for reader in self._open(bags, conversion):
                self._convert(reader, conversion)
            self._close_part()
        except BaseException:
            if self._part is not None:
                self._part.abandon()
            raise
        finally:
            with contextlib.suppress(OSError):
                self.parts.rmdir()  # if it is empty
        self._join(conversion)
        return conversion

    @property
    def _replaces(self) -> bool:
        """Whether the output is to be replaced by the parts, also if the run that began them was interrupted."""
        return (self.parts / _REPLACES).exists()

    def _mark_replacement(self) -> None:
        if self.output.is_dir() and any(self.output.iterdir()):
            self.parts.mkdir(parents=True)
            (self.parts / _REPLACES).touch()

    def _earlier(self) -> list[Path]:
        """Returns the datasets that an earlier run wrote: the output, and its parts."""
        output = [self.output] if self.output.is_dir() and any(self.output.iterdir()) and not self._replaces else []
        parts = sorted(self.parts.glob("part_*"))
        for root in (*output, *parts):
            found, wanted = ConversionLog.read(root).settings, self._settings.document()
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            if differing:
                raise ClpError(
                    f"it was converted with other settings ({', '.join(differing)})",
                    where=root,
                    hint="give another --output, or add --overwrite",
                )
        if output:
            # A run may have been killed after it joined the parts, and before it deleted them.
            joined = {episode.key for episode in ConversionLog.read(self.output).episodes}
            for part in parts:
                if joined.issuperset(episode.key for episode in ConversionLog.read(part).episodes):
                    shutil.rmtree(part)
            parts = [part for part in parts if part.exists()]
        return [*output, *parts]

    def _open(self, bags: Sequence[Path], conversion: Conversion) -> list[_Bag]:
        """Opens the recordings that are not yet converted."""
        opened: list[_Bag] = []
        seen: dict[str, Path] = {}
        complete = {fingerprint for log in self._logs for fingerprint in log.complete}
        converted = {episode.bag: episode.fingerprint for log in self._logs for episode in log.episodes}
        for path in bags:
            try:
                with _faults_of(path):
                    reader = open_bag(path)
                    bag = _Bag(reader, reader.fingerprint())
                if bag.fingerprint in seen:
                    raise ClpError(f"it is the same recording as {seen[bag.fingerprint]}", where=path)
                if converted.get(bag.name, bag.fingerprint) != bag.fingerprint:
                    hint = "convert all again with --overwrite"
                    raise ClpError("it has changed since it was converted", where=path, hint=hint)
            except ClpError as error:
                conversion.left_out[path] = str(error)
                continue
            seen[bag.fingerprint] = path
            if bag.fingerprint not in complete:
                opened.append(bag)
        self._total_s = sum(bag.seconds for bag in opened)
        return opened

    def _convert(self, bag: _Bag, conversion: Conversion) -> None:
        """Adds the episodes of a recording that are not there yet."""
        began_s = self._done_s
        before = len(conversion.episodes)
        try:
            with _faults_of(bag.path):
                plan = self._plan(bag, conversion)
            self._episodes(bag, plan, conversion)
        except ClpError as error:
            if self._part is not None:
                self._part.discard_episode()
            kept = len(conversion.episodes) - before
            conversion.left_out[bag.path] = f"{error}; {kept} episodes before it are kept" if kept else str(error)
        else:
            part = self._open_part()
            part.log.complete.append(bag.fingerprint)
            part.log.bytes_read += bag.nbytes
            if part.is_full:
                self._close_part()
        self._done_s = began_s + bag.seconds
        self._progress(self._done_s, self._total_s)

    def _plan(self, bag: _Bag, conversion: Conversion) -> list[PlannedEpisode]:
        """Returns the episodes of a recording that are not there yet."""
        embodiment = self._settings.frames.embodiment
        cut, tasks = self._cut(bag.reader), self._tasks(bag.reader)
        ears = (cut.listen(list(embodiment.demonstration_topics)), tasks.listen())
        heard = usable_ticks(bag.reader, embodiment, listen=_all_of(*ears))
        # The last tick has no next state.
        least = MIN_FRAMES + (not embodiment.action_topics)
        planned = []
        for window in cut.windows():
            inside = (heard.usable >= window.begin_ns) & (heard.usable < window.end_ns)
            runs = split_at_gaps(heard.usable[inside], embodiment.period_ns)
            kept = [run for run in runs if len(run) >= least]
            if len(kept) > 1:
                # What is left beside a gap is of use only if it is long enough to show something.
                kept = [run for run in kept if len(run) * embodiment.period_ns >= _SHORTEST_PIECE_NS]
            if len(runs) > 1:
                conversion.notes.append(self._gaps(bag, runs, len(kept), heard.unusable))
            planned += [PlannedEpisode(run, tasks.task(int(run[0]), int(run[-1]), window.task)) for run in kept]
        if not planned:
            raise ClpError(
                f"no episode has {least} consecutive control ticks with all inputs{_most(heard.unusable)}",
                where=bag.path,
                hint="record again, or loosen the topic's sync in the embodiment",
            )
        done = [one.start_ns for log in self._logs for one in log.episodes if one.fingerprint == bag.fingerprint]
        return [one for one in planned if not any(one.start_ns <= start <= one.end_ns for start in done)]

    def _gaps(self, bag: _Bag, runs: Sequence[np.ndarray], kept: int, unusable: Counter[str]) -> str:
        period_ns = self._settings.frames.embodiment.period_ns
        places = []
        for one, after in itertools.pairwise(runs):
            begin_ns, end_ns = int(one[-1]) + period_ns, int(after[0])
            places.append(f"{(begin_ns - bag.reader.start_ns) / 1e9:.1f} s for {(end_ns - begin_ns) / 1e9:.2g} s")
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        where = ", ".join(places[:3]) + more
        became = "1 episode" if kept == 1 else f"{kept} episodes"
        return f"{bag.path}: inputs are missing from {where}{_most(unusable)}; what is between became {became}"

    def _episodes(self, bag: _Bag, plan: Sequence[PlannedEpisode], conversion: Conversion) -> None:
        """Writes the planned episodes in one pass over the recording."""
        embodiment = self._settings.frames.embodiment
        ticks = [int(tick) for one in plan for tick in one.ticks]
        frames = _faults_raised(read_frames(bag.reader, embodiment, ticks, 1) if ticks else iter(()), bag.path)
        began_s = self._done_s
        current, remaining = None, list(reversed(plan))
        written: list[int] = []
        for frame in frames:
            tick = frame.observation.tick_ns
            if current is None or tick > current.end_ns or tick != written[-1] + embodiment.period_ns:
                # The planned episode ends, or one of its pictures cannot be decoded.
                self._save(bag, current, written, conversion)
                while current is None or tick > current.end_ns:
                    current = remaining.pop()
                    if self._part is not None and self._part.is_full:
                        self._close_part()
                written = []
            if frame.action_is_pad[0]:
                continue
            self._add(frame, current.task, bag.path)
            written.append(tick)
            self._done_s = began_s + min(bag.seconds, (tick - bag.reader.start_ns) // 10**9)
            self._progress(self._done_s, self._total_s)
        self._save(bag, current, written, conversion)

    def _save(self, bag: _Bag, planned: PlannedEpisode | None, ticks: Sequence[int], conversion: Conversion) -> None:
        if planned is None or self._part is None:
            return
        if len(ticks) < MIN_FRAMES:
            self._part.discard_episode()
            return
        episode = ConvertedEpisode(bag.name, bag.fingerprint, ticks[0], ticks[-1], len(ticks), planned.task)
        self._part.save(episode)
        conversion.episodes.append(episode)

    def _add(self, frame: Frame, task: str, bag: Path) -> None:
        try:
            values = self._settings.frames.values(frame)
        except ClpError as error:
            raise error.at(f"{bag}, {error.where}") from None
        part = self._open_part()
        if part.writer is None:
            try:
                part.begin(self.output.name, self._settings, values)
            except ClpError as error:
                self._part = None
                part.abandon()
                raise error.at(f"{bag}, {error.where}") from None
        assert part.writer is not None
        if not part.writer.open_frames and (fault := part.writer.fits(values)):
            raise ClpError(fault, where=bag, hint="give --resize, or convert these recordings into another dataset")
        part.writer.add(values, task)

    def _open_part(self) -> _Part:
        if self._part is None:
            index = len(list(self.parts.glob("part_*")))
            self._part = _Part(self.parts / f"part_{index:05d}", self._settings.document())
        return self._part

    def _close_part(self) -> None:
        part, self._part = self._part, None
        if part is not None and part.close():
            self._logs.append(part.log)

    def _join(self, conversion: Conversion) -> None:
        """Writes the output, if there is something to write."""
        roots = self._earlier()
        if not roots:
            return
        if roots == [self.output]:
            conversion.log = ConversionLog.read(self.output)
        else:
            conversion.log = join_datasets(roots, self.output, self._replaces or self.output in roots)
        self._delete_parts()

    def _delete_parts(self) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)


@dataclass(frozen=True)
class _Bag:
    """An opened recording."""

    reader: BagReader
    fingerprint: str

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def name(self) -> str:
        return str(self.path.absolute())

    @property
    def seconds(self) -> int:
        return max(1, (self.reader.end_ns - self.reader.start_ns) // 10**9)

    @property
    def nbytes(self) -> int:
        files = [self.path] if self.path.is_file() else [path for path in self.path.iterdir() if path.is_file()]
        return sum(path.stat().st_size for path in files)


class _Part:
    """A part of a dataset that is being written.

    Args:
        target: Its folder.
        settings: For its log.
    """

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        self.log = ConversionLog(settings)
        self.writer: DatasetWriter | None = None
        self._target = target
        self._stack = contextlib.ExitStack()

    @property
    def is_full(self) -> bool:
        return self.writer is not None and self.writer.picture_bytes >= _PART_BYTES

    def begin(self, name: str, settings: ConversionSettings, first: Mapping[str, Any]) -> None:
        root = self._stack.enter_context(dataset_folder(self._target))
        self.writer = DatasetWriter(root, name, settings.frames, first, settings.encoder)

    def save(self, episode: ConvertedEpisode) -> None:
        assert self.writer is not None
        self.writer.save_episode()
        self.log.episodes.append(episode)

    def discard_episode(self) -> None:
        if self.writer is not None and self.writer.open_frames:
            self.writer.discard_episode()

    def close(self) -> bool:
        """Completes the part, and returns whether it has episodes."""
        if self.writer is None or not self.log.episodes:
            self.abandon()
            return False
        with self._stack:
            self.writer.finish()
            check_dataset(DatasetReader(self.writer.root), self.writer.ends)
            self.log.pixels = self.writer.pixels
            write_log(self.writer.root, self.log, self.writer.features)
        return True

    def abandon(self) -> None:
        """Removes the unfinished part."""
        if self.writer is not None:
            self.writer.abandon()

        def give_up() -> None:
            with self._stack:
                raise _GivenUpError

        with contextlib.suppress(_GivenUpError):
            give_up()


class _GivenUpError(Exception):
    """The part is not wanted."""


@contextlib.contextmanager
def _faults_of(bag: Path) -> Iterator[None]:
    """Makes an error of the operating system one of the recording."""
    try:
        yield
    except OSError as error:
        raise ClpError(f"the recording cannot be read ({error.strerror or error})", where=bag) from error


def _all_of(*listeners: Listen) -> Listen:
    """Returns listeners to which each of several is called; two may hear one topic."""
    topics = {topic for listen in listeners for topic in listen}

    def call_each(topic: str) -> Callable[[Message], None]:
        calls = [listen[topic] for listen in listeners if topic in listen]

        def hear(message: Message) -> None:
            for call in calls:
                call(message)

        return hear

    return {topic: call_each(topic) for topic in topics}


def _most(unusable: Counter[str]) -> str:
    return f" ({unusable.most_common(1)[0][0]})" if unusable else ""


def _faults_raised(frames: Iterator[Frame], bag: Path) -> Iterator[Frame]:
    while True:
        with _faults_of(bag):
            frame = next(frames, None)
        if frame is None:
            return
        yield frame
