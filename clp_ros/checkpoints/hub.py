# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by repository id: from the Hugging Face hub's cache, or downloaded where the hub can be reached."""

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
# Never opened here, so not downloaded either.
_NOT_WANTED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]
# Fields of a checkpoint's JSON files that may name a repository which lerobot reads from when it loads the checkpoint.
_NAMING_FIELDS = {"vlm_model_name", "tokenizer_name", "model_name", "tokenizer_assets_repo"}
# How libraries word that they found a file neither in the cache nor on the hub.
_HUB_WORDS = re.compile(
    r"connect|cached|offline|not a valid model identifier|can't load|outgoing traffic", re.IGNORECASE
)


def is_repository(given: str | os.PathLike[str]) -> bool:
    """Whether this is ``owner/name`` or ``owner/name@revision``, and no path that exists here."""
    return _REPOSITORY.fullmatch(os.fspath(given)) is not None and not os.path.lexists(given)


def local_folder(given: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint that is given as a folder or as a repository id.

    A path that exists here is meant as a path. A repository that is whole in the hub's cache is not asked for again.

    Args:
        given: A folder, ``owner/name`` or ``owner/name@revision`` (a branch, a tag or a commit).

    Raises:
        ClpError: It is a repository id, and the repository is neither whole in the cache nor can be downloaded.
    """
    if not is_repository(given):
        return Path(given)
    match = _REPOSITORY.fullmatch(os.fspath(given))
    assert match is not None  # is_repository looked
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
            "the repository is gated", where=given, fix=f"accept its terms, hf auth login, {command}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ClpError(f"the repository has no revision {revision!r}", where=given, fix="check the revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ClpError(
            "neither a folder here nor a repository on the hub that you may read",
            where=given,
            fix="check the path or the id; for a private repository, hf auth login",
        ) from error
    except Exception as error:  # the hub's own, httpx's, and the system's: what all of them mean is that it is not here
        raise _not_cached(given, state, command) from error
    if not _is_whole(folder) and cached is not None:  # offline, the library gives what there is
        raise _not_cached(given, state, command)
    return folder


def _not_cached(given: str | os.PathLike[str], state: str, command: str) -> NotHereError:
    return NotHereError(
        f"there is no such folder, and the repository is {state} in the hub's cache and cannot be downloaded now",
        where=given,
        fix=command,
    )


def _cached(repository: str, revision: str | None = None) -> Path | None:
    """The repository's snapshot in the cache, whole or not; None where there is none."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ModuleNotFoundError as error:
        raise NotHereError(
            "there is no such folder; reading a repository needs huggingface_hub",
            where=repository,
            fix="pip install huggingface_hub, or give a folder",
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot holds a config and all weights: other programs download single files into the same cache."""
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
    """The repository whose absence made loading fail, as an error that names it; None where that was not the cause.

    Args:
        error: What a library raised.
        *documents: The checkpoint's JSON files, which name the repositories it needs.
    """
    text = str(error)
    absent = [name for document in documents for name in _repositories(document) if _cached(name) is None]
    named = [name for name in absent if name in text]
    if not absent or not (named or _HUB_WORDS.search(text)):
        return None
    return NotHereError(
        f"the checkpoint needs {(named or absent)[0]}, which is not in the hub's cache and cannot be downloaded now",
        fix=f"hf download {(named or absent)[0]}",
    )


def _repositories(document: Any) -> Iterator[str]:
    """Repository ids in the fields of a JSON file that lerobot loads something by."""
    if isinstance(document, list):
        for item in document:
            yield from _repositories(item)
    elif isinstance(document, Mapping):
        for key, value in document.items():
            if key in _NAMING_FIELDS and isinstance(value, str) and is_repository(value):
                yield value
            else:
                yield from _repositories(value)
