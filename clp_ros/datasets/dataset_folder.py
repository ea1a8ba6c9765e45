# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset's folder in one step, from parts that were written before."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.io_utils import write_stats

from clp_ros.core.errors import ClpError
from clp_ros.core.files import atomic_folder
from clp_ros.datasets.conversion_log import ConversionLog
from clp_ros.datasets.dataset_check import DatasetReader, check_merged
from clp_ros.datasets.dataset_writer import library_output_hidden
from clp_ros.datasets.exact_statistics import exact_statistics

# LeRobot creates the dataset's folder, so it is made inside the temporary one.
_INSIDE = "dataset"


@contextlib.contextmanager
def dataset_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path at which to create a dataset, and makes it ``target`` when the block succeeds.

    Args:
        target: The folder to write.
        overwrite: Whether a folder that is not empty is replaced.

    Raises:
        ClpError: See :func:`atomic_folder`.
    """
    with atomic_folder(target, overwrite) as temporary:
        root = temporary / _INSIDE
        yield root
        for path in root.iterdir():
            path.rename(temporary / path.name)
        root.rmdir()


def write_log(root: Path, log: ConversionLog, features: dict[str, dict[str, object]]) -> None:
    """Writes the exact statistics of a complete dataset, and its log."""
    write_stats(exact_statistics(root, features, log.pixels), root)
    log.write(root)


def join_datasets(sources: Sequence[Path], target: Path, overwrite: bool = False) -> ConversionLog:
    """Writes a dataset with all episodes of several, in their order.

    Args:
        sources: Datasets that clp convert wrote.
        target: The folder to write. It may be one of the sources, if ``overwrite`` is set.
        overwrite: Whether a folder that is not empty is replaced.

    Returns:
        The new dataset's log.

    Raises:
        ClpError: The datasets do not fit each other.
    """
    log = ConversionLog.merged([ConversionLog.read(source) for source in sources])
    with dataset_folder(target, overwrite) as root:
        if len(sources) == 1:
            shutil.copytree(sources[0], root, copy_function=_link)
            return log
        readers = [DatasetReader(source) for source in sources]
        _check_same(readers)
        # With pictures in the data files, LeRobot would read each file again for each source.
        pictures = bool(readers[0].meta.image_keys)
        with library_output_hidden(), contextlib.redirect_stderr(io.StringIO()):
            aggregate_datasets(
                [source.name for source in sources],
                target.name,
                roots=[Path(source) for source in sources],
                aggr_root=root,
                concatenate_data=not pictures,
            )
        merged = DatasetReader(root)
        check_merged(merged, readers)
        write_log(root, log, merged.meta.features)
    return log


def shard_folder(output: Path, index: int, count: int) -> Path:
    """Returns the folder of a shard of a dataset, beside the dataset's."""
    return output.with_name(f"{output.name}.shard-{index}-of-{count}")


def find_shards(output: Path) -> list[Path]:
    """Returns the folders of all shards of a dataset, in their order.

    Raises:
        ClpError: There are none, one is missing, or there are shards of several numbers.
    """
    pattern = re.compile(re.escape(output.name) + r"\.shard-(\d+)-of-(\d+)")
    found: dict[int, set[int]] = {}
    for path in output.absolute().parent.glob(f"{glob.escape(output.name)}.shard-*"):
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    hint = "convert with --shard 0/N, 1/N, …, or give the datasets to merge"
    if not found:
        raise ClpError(f"there are no shards {output.name}.shard-0-of-N beside it", where=output, hint=hint)
    if len(found) > 1:
        numbers = " and of ".join(map(str, sorted(found)))
        raise ClpError(f"there are shards of {numbers}", where=output, hint="delete those of an earlier run")
    ((count, indices),) = found.items()
    if missing := sorted(set(range(count)) - indices):
        fault = f"shard {missing[0]} of {count} is missing"
        raise ClpError(fault, where=output, hint=f"convert with --shard {missing[0]}/{count}")
    return [shard_folder(output.absolute(), index, count) for index in range(count)]


def merge_datasets(sources: Sequence[Path], target: Path, overwrite: bool = False) -> ConversionLog:
    """Merges datasets that clp convert wrote, in their order, and verifies the result.

    Returns:
        The new dataset's log.

    Raises:
        ClpError: They were converted with other settings, two have the same episode, or the output is not empty.
    """
    logs = [ConversionLog.read(source) for source in sources]
    seen: dict[tuple[str, int], Path] = {}
    for source, log in zip(sources, logs, strict=True):
        differing = [name for name in log.settings if log.settings[name] != logs[0].settings.get(name)]
        if differing:
            what = f"it was converted with other settings than {sources[0]} ({', '.join(differing)})"
            raise ClpError(what, where=source, hint="convert all recordings with the same settings")
        for episode in log.episodes:
            if episode.key in seen:
                raise ClpError(f"the episode of {episode.bag} is in {seen[episode.key]} too", where=source)
            seen[episode.key] = source
    return join_datasets(sources, target, overwrite)


def _check_same(readers: Sequence[DatasetReader]) -> None:
    """Refuses datasets with other features.

    Raises:
        ClpError: They differ.
    """

    def kinds(reader: DatasetReader) -> dict[str, object]:
        return {
            name: (feature["dtype"], tuple(feature["shape"]), feature["names"])
            for name, feature in reader.meta.features.items()
        }

    first = kinds(readers[0])
    for reader in readers[1:]:
        for name, kind in kinds(reader).items():
            if first.get(name) != kind:
                raise ClpError(
                    f"the feature {name} is {kind}, but {first.get(name)} in {readers[0].root}",
                    where=reader.root,
                    hint="convert all recordings with the same settings",
                )


def _link(source: str, target: str) -> None:
    """Gives a file a second name, or copies it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
