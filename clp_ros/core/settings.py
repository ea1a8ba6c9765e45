# SPDX-License-Identifier: Apache-2.0
"""Settings in YAML, validated on load: unknown keys are errors, with a did-you-mean."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.core.strict_model import StrictModel, describe, place


class Settings(StrictModel):
    """Base of everything read from YAML."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that refuses repeated keys of a mapping, which YAML forbids and PyYAML does not check.

    ruamel.yaml checks the rule itself, but takes twice as long to load a file and reads YAML 1.2, in which ``yes`` and
    ``12:30`` are strings and ``010`` is ten: settings that users have written would change their meaning.
    """


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # "<<: *anchor": the mapping's own keys override its keys
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            continue  # construct_mapping refuses it
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def did_you_mean(name: str, known: list[str]) -> str:
    """Returns the hint for an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"


def load_settings[SettingsT: Settings](path: Path, schema: type[SettingsT]) -> SettingsT:
    """Reads one YAML file.

    Raises:
        ClpError: The file is missing, is not YAML, or does not fit ``schema``; the message names the file and the key.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ClpError("no such file", where=path, hint="check the path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else error
        raise ClpError(f"the file is not YAML ({problem})", where=path, hint="correct the syntax") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid date
        reason = getattr(error, "strerror", None) or error
        raise ClpError(f"the file cannot be read ({reason})", where=path, hint="give a YAML file in UTF-8") from error
    except RecursionError:
        raise ClpError("the file is nested too deeply", where=path, hint="start from a file under config/") from None
    if not isinstance(document, dict):
        raise ClpError("the file does not hold a mapping", where=path, hint="start from a file under config/")
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise _fault(error, path, schema) from error


def _fault(error: ValidationError, path: Path, schema: type[Settings]) -> ClpError:
    # An unknown key first: for a mistyped key, pydantic lists the missing one before the unknown one.
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = place(first)
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        known = _keys_at(schema, first["loc"][:-1])
        return ClpError(f"unknown key {key!r}", where=path, hint=did_you_mean(name, known))
    what = f"key {key!r}: {describe(first)}" if key else describe(first)
    return ClpError(what, where=path, hint="read the comments in the files under config/")


def _keys_at(schema: Any, location: tuple[Any, ...]) -> list[str]:
    """Returns the keys of a schema at a location, following models, mappings and sequences of them."""
    current = schema
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:
            arguments = [a for a in getattr(current, "__args__", ()) if a is not Ellipsis]
            current = arguments[-1] if arguments else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def find_settings(name_or_path: str | Path, folder: str, kind: str) -> Path:
    """Returns the YAML file for a name under ``config/<folder>``, or for a path.

    Args:
        name_or_path: ``aloha_bimanual``, or a path that ends in .yaml or .yml.
        folder: Folder under config/.
        kind: What it is, for the error.

    Raises:
        ClpError: No file has that name.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        try:
            return Path(text).expanduser()
        except RuntimeError:  # there is no such user
            return Path(text)
    known = {path.stem: path for path in resource_path(f"config/{folder}").glob("*.yaml")}
    if text in known:
        return known[text]
    raise ClpError(
        f"unknown {kind} {text!r}", where=kind, hint=f"{did_you_mean(text, list(known))}, or give a .yaml file"
    )
