# SPDX-License-Identifier: Apache-2.0
"""Writes output atomically: under a temporary name, which is then changed."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError

# The names from _hidden_folder.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}(?P<kind>\.partial|\.old)")


def refuse_lfs_pointer(start: bytes, where: object) -> None:
    """Refuses the pointer that Git leaves in a file's place after cloning without Git LFS.

    Args:
        start: The file's first bytes, at least 8.
        where: The file, for the error.

    Raises:
        ClpError: The file is a pointer.
    """
    if start.startswith(b"version https://git-lfs"[: len(start)]) and len(start) >= 8:
        raise ClpError(
            "the file is a Git LFS pointer, not the content",
            where=where,
            hint="run `git lfs pull` in the clone, or `hf download` of the repository",
        )


def check_output_folder(target: Path, overwrite: bool = False) -> None:
    """Refuses an output folder that is not empty, or cannot be replaced.

    Raises:
        ClpError: ``target`` is a file, a link or a mount point, or a folder that is not empty while ``overwrite`` is
            false.
    """
    if target.is_dir() and os.path.ismount(target):
        # A mounted volume, as in a container, cannot be replaced in one step.
        raise ClpError("the output folder is a mount point", where=target, hint="give a folder inside it")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ClpError("the output is a file, not a folder", where=target, hint="give another --output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ClpError("the output folder is not empty", where=target, hint="give another --output, or add --overwrite")


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output folder that contains an input or is inside one: overwriting it would delete the input.

    Raises:
        ClpError: It contains an input or is inside one.
    """
    # Paths are also compared without resolving links, because a link in the output to an input would be deleted too.
    ways: tuple[Callable[[Path], str], ...] = (os.path.realpath, os.path.abspath)
    for given, way in itertools.product(inputs, ways):
        output, source = Path(way(target)), Path(way(given))
        if output.is_relative_to(source) or source.is_relative_to(output):
            raise ClpError(
                f"the output folder is inside {given} or contains it", where=target, hint="give an --output outside"
            )


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``target`` and renames it to ``target`` when the block succeeds.

    On any exception, including KeyboardInterrupt, the temporary folder is removed and ``target`` is not changed. With
    ``overwrite``, the old folder is first renamed, and deleted after the new one has replaced it. Leftovers of a killed
    process for the same target are deleted first (:func:`clear_leftovers`).

    Args:
        target: The folder to create. Its parents are created too.
        overwrite: Whether a folder that is not empty may be replaced.

    Raises:
        ClpError: See :func:`check_output_folder`; or the parent folder cannot be written.
    """
    target = Path(target)
    check_output_folder(target, overwrite)
    target = target.resolve()
    clear_leftovers(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _locked_temporary(target)
    except OSError as error:
        raise ClpError(
            f"the folder cannot be written ({error.strerror})", where=target.parent, hint="give another --output"
        ) from error
    try:
        yield temporary
        _open_files(temporary)
        check_output_folder(target, overwrite)  # another process may have written there meanwhile
        _replace_folder(temporary, target)
    except BaseException:
        _discard(temporary)
        raise
    finally:
        os.close(lock)


def is_temporary(folder: Path) -> bool:
    """Whether a folder is a temporary one of :func:`atomic_folder`, by its name: incomplete, or about to be deleted."""
    return _TEMPORARY.fullmatch(folder.name) is not None


def clear_leftovers(target: str | os.PathLike[str]) -> None:
    """Deletes the leftovers of killed processes for ``target``. Running processes hold a lock on their folder.

    Incomplete folders are deleted. A renamed old folder is restored if nothing has replaced it, otherwise deleted.
    """
    target = Path(target).resolve()
    if not target.parent.is_dir():
        return
    found: dict[str, list[Path]] = {".partial": [], ".old": []}
    for path in target.parent.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["target"] == target.name and path.is_dir() and not path.is_symlink():
            found[match["kind"]].append(path)
    cleared = [_discard_unlocked(path) for path in found[".partial"]]
    if not all(cleared):
        return  # a running process may have renamed the old folder
    for path in found[".old"]:
        if target.exists():
            _discard(path)
        else:
            path.replace(target)


def _locked_temporary(target: Path) -> tuple[Path, int]:
    """Returns a temporary folder and its descriptor with a lock, which the system releases when the process ends."""
    while True:
        # The folder is hidden and not named as a checkpoint, so that it is not used if the process is killed before the
        # rename.
        temporary = _hidden_folder(target, ".partial")
        lock = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # without locks in the file system, no process deletes this folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():  # another process may have deleted it before it was locked
            return temporary, lock
        os.close(lock)


def _hidden_folder(target: Path, suffix: str) -> Path:
    """Creates an empty folder beside ``target`` like mkdtemp, but with the umask's mode, because it becomes the
    output."""
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{suffix}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _open_files(folder: Path) -> None:
    """Gives files at least the umask's mode, because files from safetensors are readable by their owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


def _discard_unlocked(folder: Path) -> bool:
    """Deletes a folder unless a process holds its lock. Returns whether it was deleted."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return not folder.exists()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(folder)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _discard(folder: Path) -> None:
    """Deletes a folder, its settings first, so that an interrupted deletion leaves nothing that loads."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        new.replace(target)  # an empty folder is replaced by rename(2) itself
        return
    old = _hidden_folder(target, ".old")
    target.replace(old)
    try:
        new.replace(target)
    except BaseException:
        old.replace(target)
        raise
    _discard(old)


def rewrite_json(folder: Path, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Calls ``change`` with the JSON objects at the top level of a folder, by file name, to edit in place; writes them.

    Files that ``change`` does not edit keep their bytes.
    """
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict):
            documents[path.name] = document
    before = {name: json.dumps(document) for name, document in documents.items()}
    change(documents)
    for name, document in documents.items():
        if json.dumps(document) != before[name]:
            (folder / name).write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
