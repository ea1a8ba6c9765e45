# SPDX-License-Identifier: Apache-2.0
"""A task: an instruction for a policy, and the embodiment for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from clp_ros.core.errors import ClpError
from clp_ros.core.settings import Settings, did_you_mean, find_settings, load_settings
from clp_ros.robots.embodiment import Embodiment

# The placeholder of the object in an instruction.
_OBJECT = "{object}"


class Task(Settings):
    """A task.

    Attributes:
        instruction: The policy's instruction. ``{object}`` in it is replaced by one of ``objects``.
        objects: The objects to choose from; empty if there is no choice. A choice is written with ``_`` for spaces:
            ``groceries_to_basket:tomato_can``.
        embodiment: Name of its embodiment; None: any.
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
        """Its objects, by the text that chooses them."""
        return {name.replace(" ", "_"): name for name in self.objects}

    def with_object(self, choice: str) -> Task:
        """Returns the task with one of its objects, given by a key of :attr:`choices`.

        Raises:
            ClpError: The task has no such object, or needs a choice.
        """
        if not choice and not self.objects:
            return self
        if not self.objects:
            raise ClpError(
                f"the task has no objects to choose from, but {choice!r} is given", hint="leave the object out"
            )
        if choice not in self.choices:
            what = f"the task has no object {choice!r}" if choice else "the task needs an object"
            raise ClpError(what, hint=f"{did_you_mean(choice, list(self.choices))}; write TASK:OBJECT")
        instruction = self.instruction.replace(_OBJECT, self.choices[choice])
        return self.model_copy(update={"instruction": instruction, "objects": []})


def read_task(name_or_path: str | Path) -> Task:
    """Reads a task by its name under config/tasks or from a .yaml file, without choosing an object.

    Raises:
        ClpError: There is no such task, or a key is wrong. The message names the key.
    """
    return load_settings(find_settings(name_or_path, "tasks", "task"), Task)


def load_task(name_or_text: str | Path, embodiment: Embodiment | None = None) -> Task:
    """Reads a task by its name under config/tasks or from a .yaml file. Text with a space is an instruction.

    Args:
        name_or_text: The name, file or text. If the task has objects, ``:`` and one of them follow.
        embodiment: The robot for the task.

    Raises:
        ClpError: The instruction is empty, there is no such task or object, or it is for another embodiment or other
            cameras.
    """
    text = str(name_or_text).strip()
    if not text:
        raise ClpError("the task is empty", where="task", hint="give the name of a task or an instruction")
    name, _, chosen = text.rpartition(":") if re.search(r":\w*$", text) else (text, "", "")
    if re.search(r"\s", text) and not name.endswith((".yaml", ".yml")):
        try:
            return Task(instruction=text)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ClpError(
                f"{text!r} is not an instruction ({why})",
                where="task",
                hint="write in words what the robot is to do",
            ) from None
    path = find_settings(name, "tasks", "task")
    task = load_settings(path, Task)
    try:
        task = task.with_object(chosen or "")
    except ClpError as error:
        raise error.at(path) from None
    if embodiment is None:
        return task
    if task.embodiment not in (None, embodiment.name):
        raise ClpError(
            f"the task is for {task.embodiment}, but the robot is {embodiment.name}",
            where=path,
            hint="give a task and an embodiment that fit each other",
        )
    if unknown := sorted(set(task.cameras) - set(embodiment.cameras)):
        raise ClpError(
            f"the robot {embodiment.name} has no camera {unknown[0]!r}",
            where=path,
            hint=f"use {' or '.join(embodiment.cameras)}",
        )
    return task
