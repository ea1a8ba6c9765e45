# SPDX-License-Identifier: Apache-2.0
"""The known families: those of this package, and those registered by other distributions.

Another distribution registers a family in the entry-point group ``clp_ros.policy_families``, under the family's name::

    [project.entry-points."clp_ros.policy_families"]
    my_vla = "my_package.my_vla.family:FAMILY"

Its module is imported only if no family of this package matches. An entry that does not load is an error if the user
names that family, or if no other family recognises the checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from clp_ros.core.errors import ClpError
from clp_ros.policies.family import Config, Family

GROUP = "clp_ros.policy_families"


@cache
def built_in_families() -> MappingProxyType[str, Family]:
    """Returns the families of this package by name. They need no installation."""
    package = importlib.import_module("clp_ros.policies")
    modules = [
        f"{package.__name__}.{info.name}.family" for info in pkgutil.iter_modules(package.__path__) if info.ispkg
    ]
    found = [importlib.import_module(module).FAMILY for module in modules]
    return MappingProxyType({family.name: family for family in sorted(found, key=lambda family: family.name)})


@cache
def _registered() -> MappingProxyType[str, tuple[EntryPoint, ...]]:
    """Returns the entries of other distributions by name, without this package's own."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in built_in_families():
            entries = found.setdefault(entry.name, [])
            if all(entry.value != other.value for other in entries):  # one distribution may be on the path twice
                entries.append(entry)
        elif not entry.module.startswith("clp_ros.policies."):
            warnings.warn(
                f"{_distribution(entry)} registers a family {entry.name!r}, which is clp_ros's own: it is not used",
                RuntimeWarning,
                stacklevel=2,
            )
    return MappingProxyType({name: tuple(entries) for name, entries in sorted(found.items())})


def _distribution(entry: EntryPoint) -> str:
    return f"the distribution {entry.dist.name}" if entry.dist is not None else "a distribution"


@cache
def _load(name: str) -> Family:
    """Loads the family that another distribution registers under a name.

    Raises:
        ClpError: Its entry does not load, or is not a family of that name.
    """
    first, *others = _registered()[name]
    where = f"entry point {name} of {GROUP}"
    if others:
        both = " and ".join(_distribution(entry) for entry in (first, *others))
        raise ClpError(f"both {both} register a family of this name", where=where, hint="uninstall one of them")
    hint = f"update or uninstall {_distribution(first)}"
    try:
        family = first.load()
    except Exception as error:  # the import of that module may raise anything
        raise ClpError(
            f"{first.value} of {_distribution(first)} does not load ({type(error).__name__}: {error})",
            where=where,
            hint=hint,
        ) from error
    if not isinstance(family, Family) or family.name != name:
        what = f"the family {family.name!r}" if isinstance(family, Family) else "not a Family"
        raise ClpError(f"{first.value} of {_distribution(first)} is {what}", where=where, hint=hint)
    return family


def families() -> dict[str, Family]:
    """Returns all families by name. Those of other distributions that do not load are left out with a warning."""
    found = dict(built_in_families())
    for name in _registered():
        try:
            found[name] = _load(name)
        except ClpError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
    return dict(sorted(found.items()))


def family_named(name: str) -> Family:
    """Returns the family of this name.

    Raises:
        ClpError: There is no such family, or the entry of another distribution does not load.
    """
    if name in built_in_families():
        return built_in_families()[name]
    if name in _registered():
        return _load(name)
    known = sorted([*built_in_families(), *_registered()])
    raise ClpError(f"unknown family {name!r}", where="family", hint=f"use one of: {', '.join(known)}")


def family_of(config: Config, where: object) -> Family:
    """Returns the family that recognises a checkpoint's config.json. Families of this package take precedence.

    Args:
        config: The parsed config.json.
        where: The file it was read from, for the error.

    Raises:
        ClpError: No family recognises it. The message names families that do not load.
    """
    for family in built_in_families().values():
        if family.recognises(config):
            return family
    faults = []
    for name in _registered():
        try:
            family = _load(name)
            if family.recognises(config):
                return family
        except ClpError as error:
            faults.append(error)
        except Exception as error:  # noqa: BLE001 - code of that distribution may raise anything
            whose = _distribution(_registered()[name][0])
            what = f"the family {name} of {whose} fails ({type(error).__name__}: {error})"
            faults.append(ClpError(what, hint=f"update or uninstall {whose}"))
    known = sorted([*built_in_families(), *_registered()])
    raise ClpError(
        "; ".join(
            [f"no known family recognises this config (type {config.get('type')!r})", *(fault.what for fault in faults)]
        ),
        where=where,
        hint=f"give a checkpoint of one of: {', '.join(known)}" if not faults else str(faults[0].hint),
    )
