# SPDX-License-Identifier: Apache-2.0
"""Finds checkpoints by repository id, in the Hugging Face Hub's cache or by download."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clp_ros.core.errors import ClpError, NotHereError

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"(?P<id>{_NAME}/{_NAME})(@(?P<revision>[\w./-]+))?")
# Files that are never opened, and therefore not downloaded.
_NOT_WANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]
# Fields of a checkpoint's JSON files that may name a repository which lerobot reads from when it loads the checkpoint.
_NAMING_FIELDS = {"vlm_model_name", "tokenizer_name", "model_name", "tokenizer_assets_repo"}
# What libraries write if a file is neither in the cache nor on the Hub.
_HUB_WORDS = re.compile(
    r"connect|cached|offline|not a valid model identifier|can't load|outgoing traffic", re.IGNORECASE
)


def is_repository(given: str | os.PathLike[str]) -> bool:
    """Whether this is ``owner/name`` or ``owner/name@revision``, and not an existing path."""
    return _REPOSITORY.fullmatch(os.fspath(given)) is not None and not os.path.lexists(given)


def local_folder(given: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that is given as a folder or as a repository id.

    An existing path takes precedence. A repository that is complete in the cache is not downloaded again.

    Args:
        given: A folder, ``owner/name`` or ``owner/name@revision`` (a branch, a tag or a commit).

    Raises:
        ClpError: The repository is not complete in the cache and cannot be downloaded.
    """
    if not is_repository(given):
        return Path(given)
    match = _REPOSITORY.fullmatch(os.fspath(given))
    assert match is not None  # is_repository has matched it
    repository, revision = match["id"], match["revision"]
    cached = _cached(repository, revision)
    if cached is not None and _is_whole(cached):
        return cached
    from huggingface_hub import errors, snapshot_download

    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    state = "only partly" if cached is not None else "not"
    try:
        folder = Path(snapshot_download(repository, revision=revision, ignore_patterns=_NOT_WANTED))
    except errors.GatedRepoError as error:
        raise ClpError(
            "the repository is gated",
            where=given,
            hint=f"accept its terms on the Hub, then run `hf auth login` and `{command}`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ClpError(
            f"the repository has no revision {revision!r}", where=given, hint="check the revision"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ClpError(
            "neither a local folder nor a Hub repository that you can read",
            where=given,
            hint="check the path or the id; for a private repository, run `hf auth login`",
        ) from error
    except Exception as error:  # errors of the Hub, httpx or the system: the repository is not here
        raise _not_cached(given, state, command) from error
    if not _is_whole(folder) and cached is not None:  # offline, the library returns an incomplete snapshot
        raise _not_cached(given, state, command)
    return folder


def _not_cached(given: str | os.PathLike[str], state: str, command: str) -> NotHereError:
    return NotHereError(
        f"no such folder; the repository is {state} in the Hub's cache and cannot be downloaded now",
        where=given,
        hint=f"run `{command}` where there is internet access",
    )


def _cached(repository: str, revision: str | None = None) -> Path | None:
    """Returns the repository's snapshot in the cache, complete or not; None if there is none."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError as error:
        raise NotHereError(
            "no such folder; to read a Hub repository, huggingface_hub is needed",
            where=repository,
            hint="run `pip install huggingface_hub`, or give a folder",
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config and all weights. Other programs download single files into the same cache."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def missing_repository(error: Exception, *documents: Mapping[str, Any]) -> NotHereError | None:
    """Returns an error that names the missing repository; None if loading failed for another reason.

    Args:
        error: The library's exception.
        *documents: The checkpoint's JSON files, which name the repositories it needs.
    """
    text = str(error)
    absent = [name for document in documents for name in _repositories(document) if _cached(name) is None]
    named = [name for name in absent if name in text]
    if not absent or not (named or _HUB_WORDS.search(text)):
        return None
    return NotHereError(
        f"the checkpoint needs {(named or absent)[0]}, which is not in the Hub's cache and cannot be downloaded now",
        hint=f"run `hf download {(named or absent)[0]}`",
    )


def _repositories(document: Any) -> Iterator[str]:
    """Yields the repository ids in those fields of a JSON file from which lerobot loads."""
    if isinstance(document, list):
        for item in document:
            yield from _repositories(item)
    elif isinstance(document, Mapping):
        for key, value in document.items():
            if key in _NAMING_FIELDS and isinstance(value, str) and is_repository(value):
                yield value
            else:
                yield from _repositories(value)
