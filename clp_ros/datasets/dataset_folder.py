# SPDX-License-Identifier: Apache-2.0
"""Writes a dataset's folder in one step, from parts that were written before."""

from __future__ import annotations

import contextlib
import io
import os
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
