# SPDX-License-Identifier: Apache-2.0
"""Which simulated tasks there are: the files of ``clp_ros.simulation.tasks``, and those of other distributions.

Another distribution registers a package of tasks in the entry-point group ``clp_ros.simulated_tasks``, under any name::

    [project.entry-points."clp_ros.simulated_tasks"]
    my_tasks = "my_package.tasks"

Every module of that package with a ``TASK`` is a task.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.robots.embodiment import Embodiment
from clp_ros.simulation.task import SimulatedTask

GROUP = "clp_ros.simulated_tasks"
_OWN = "clp_ros.simulation.tasks"


def _tasks_of(package: ModuleType) -> dict[str, SimulatedTask]:
    """Returns the tasks of a package's modules, by name.

    Raises:
        ClpError: A ``TASK`` is not a task, or two have one name.
    """
    found: dict[str, SimulatedTask] = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        task = getattr(importlib.import_module(info.name), "TASK", None)
        if task is None:
            continue
        if not isinstance(task, SimulatedTask):
            raise ClpError("TASK is not a SimulatedTask", where=info.name, hint="write TASK = MyTask()")
        if task.name in found:
            raise ClpError(f"there are two tasks {task.name!r}", where=info.name, hint="rename one of them")
        found[task.name] = task
    return found


@cache
def simulated_tasks() -> MappingProxyType[str, SimulatedTask]:
    """Returns all tasks by name: clp_ros's own, and those of other distributions that can be imported.

    A distribution whose tasks cannot be imported, or have the name of another task, is left out with a warning.
    """
    found = _tasks_of(importlib.import_module(_OWN))
    for entry in entry_points(group=GROUP):
        whose = f"the entry point {entry.name} of {GROUP} ({entry.value})"
        try:
            others = _tasks_of(importlib.import_module(entry.value))
        except Exception as error:  # noqa: BLE001 - whatever that package does when it is imported
            warnings.warn(f"{whose} is left out: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
            continue
        for name, task in others.items():
            if name in found and found[name] is not task:
                warnings.warn(f"{whose}: there is a task {name!r} already", RuntimeWarning, stacklevel=2)
            else:
                found[name] = task
    return MappingProxyType(dict(sorted(found.items())))


def tasks_for(robot: str) -> dict[str, SimulatedTask]:
    """Returns the tasks that a robot can do, by name."""
    return {name: task for name, task in simulated_tasks().items() if robot in task.robots}


def simulated_task(name: str, embodiment: Embodiment) -> SimulatedTask:
    """Returns a task by name.

    Raises:
        ClpError: There is no such task, or the robot cannot do it.
    """
    tasks = simulated_tasks()
    if name not in tasks:
        raise ClpError(f"unknown simulated task {name!r}", hint=did_you_mean(name, list(tasks)))
    if embodiment.name not in tasks[name].robots:
        known = ", ".join(tasks_for(embodiment.name))
        raise ClpError(
            f"{embodiment.name} cannot do the simulated task {name!r}",
            hint=f"use one of its tasks: {known}" if known else f"use one of: {', '.join(tasks[name].robots)}",
        )
    return tasks[name]
