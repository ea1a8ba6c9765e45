# SPDX-License-Identifier: Apache-2.0
"""A task: the instruction a policy is given, and the embodiment it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import Settings, did_you_mean, find_settings, load_settings
from clp_ros.robots.embodiment import Embodiment

# What stands for the object in the instruction of a task that has several.
_OBJECT = "{object}"


class Task(Settings):
    """A task.

    Attributes:
        instruction: What the policy reads; ``{object}`` in it stands for one of ``objects``.
        objects: What the task can be done with; empty where it is always the same. Written with ``_`` for spaces when
            one is chosen: ``groceries_to_basket:tomato_can``.
        embodiment: Name of the embodiment it is for; None where any will do.
        cameras: Names of the embodiment's cameras that the task was recorded with.
        execution_length: Steps of a chunk that are executed before the next (paper, appendix A.4).
        episodes: Number of demonstrations recorded (paper, Table 7).
    """

    instruction: str = Field(pattern=r"\S")
    objects: list[Annotated[str, Field(pattern=r"^\w+( \w+)*$")]] = Field(default_factory=list)
    embodiment: str | None = None
    cameras: list[str] = Field(default_factory=list)
    execution_length: Annotated[int, Field(gt=0)] = 10
    episodes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _objects_belong_to_the_instruction(self) -> Self:
        if (_OBJECT in self.instruction) != bool(self.objects):
            raise ValueError(f"objects and {_OBJECT} in the instruction go together")
        return self

    @property
    def choices(self) -> dict[str, str]:
        """Its objects, by how one is chosen."""
        return {name.replace(" ", "_"): name for name in self.objects}

    def with_object(self, choice: str) -> Task:
        """The task with one of its objects, in the words of :attr:`choices`.

        Raises:
            ClpError: It has no such object, or has several and none is chosen.
        """
        if not choice and not self.objects:
            return self
        if not self.objects:
            raise ClpError(f"the task has no objects, {choice!r} is given", fix="leave it out")
        if choice not in self.choices:
            what = f"the task has no object {choice!r}" if choice else "the task needs an object"
            raise ClpError(what, fix=f"{did_you_mean(choice, list(self.choices))}; write TASK:OBJECT")
        instruction = self.instruction.replace(_OBJECT, self.choices[choice])
        return self.model_copy(update={"instruction": instruction, "objects": []})


def read_task(name_or_path: str | Path) -> Task:
    """Reads a task by its name under config/tasks or from a .yaml file, with its objects still to be chosen.

    Raises:
        ClpError: There is no such task, or something in it is wrong; it names the key.
    """
    return load_settings(find_settings(name_or_path, "tasks", "task"), Task)


def load_task(name_or_text: str | Path, embodiment: Embodiment | None = None) -> Task:
    """Reads a task by its name under config/tasks or from a .yaml file; text with a space is the instruction itself.

    Args:
        name_or_text: The name, file or text. ``:`` and one of its objects follow where the task has several.
        embodiment: The robot that is to do it.

    Raises:
        ClpError: The instruction is empty, there is no such task or object, or it is for another embodiment or other
            cameras.
    """
    text = str(name_or_text).strip()
    if not text:
        raise ClpError("the task is empty", fix="give the name of a task or an instruction")
    name, _, chosen = text.rpartition(":") if re.search(r":\w*$", text) else (text, "", "")
    if re.search(r"\s", text) and not name.endswith((".yaml", ".yml")):
        try:
            return Task(instruction=text)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ClpError(
                f"{text!r} is no instruction ({why})", fix="write in words what the robot is to do"
            ) from None
    path = find_settings(name, "tasks", "task")
    task = load_settings(path, Task)
    try:
        task = task.with_object(chosen or "")
    except ClpError as error:
        raise ClpError(error.what, where=path, fix=error.fix) from None
    if embodiment is None:
        return task
    if task.embodiment not in (None, embodiment.name):
        raise ClpError(
            f"the task is for {task.embodiment}, the robot is {embodiment.name}",
            where=path,
            fix="give the task or the embodiment that fits the other",
        )
    if unknown := sorted(set(task.cameras) - set(embodiment.cameras)):
        raise ClpError(
            f"{embodiment.name} has no camera {unknown[0]!r}",
            where=path,
            fix=f"its cameras are {', '.join(embodiment.cameras)}",
        )
    return task
