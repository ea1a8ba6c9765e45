# SPDX-License-Identifier: Apache-2.0
"""A loaded base with several task heads, which it exchanges between two chunks by the instruction."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from clp_ros.checkpoints.folder import CONFIG_FILE
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.core.settings import did_you_mean
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.training.heads import TENSORS_FILE, check_base, copy_files, head_tensors, read_head

if TYPE_CHECKING:
    import numpy as np
    import torch

    from clp_ros.policies.normalisation import Normalisation

# Fields of lerobot's config that say where and how a policy runs, and not what it computes.
_OF_THE_MACHINE = {"device", "compile_model", "compile_mode", "vlm_model_name", "load_vlm_weights", "pretrained_path"}


@dataclass(frozen=True)
class LoadedHead:
    """A head in memory.

    Attributes:
        weights: Its tensors by name in the model's state dict, with the model's dtypes, on the policy's device.
        preprocessor: Its pipeline from observations to batches, with its statistics.
        postprocessor: Its pipeline from the model's actions to the robot's.
        normalisation: How these normalise.
        config: The fields of lerobot's config.
    """

    weights: Mapping[str, torch.Tensor]
    preprocessor: Any
    postprocessor: Any
    normalisation: Normalisation
    config: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.weights.values())


@dataclass
class TaskHeads(LeRobotPolicy):
    """A policy that takes the weights, statistics and processors of the instruction's head before it predicts.

    A switch copies tensors inside of the memory of the device; the base is not loaded again. Instructions without a
    head are refused. Created by :func:`load_task_heads`.

    Attributes:
        heads: The heads by instruction.
        switch_s: Duration of the last switch in seconds.
    """

    heads: dict[str, LoadedHead] = field(default_factory=dict, kw_only=True)
    switch_s: float = field(default=0.0, init=False)
    _base: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _now: LoadedHead | None = field(default=None, init=False, repr=False)
    _horizon: int | None = field(default=None, init=False, repr=False)

    def check_task(self, instruction: str) -> None:
        """Refuses an instruction without a head.

        Raises:
            ClpError: No head is for it.
        """
        if instruction not in self.heads:
            raise ClpError(
                f"no head is for the task {instruction!r}",
                where="heads",
                hint=did_you_mean(instruction, list(self.heads)) or f"the tasks are {', '.join(map(repr, self.heads))}",
            )

    def switch(self, instruction: str) -> bool:
        """Takes the head of an instruction. Returns whether it was another one.

        Not thread-safe: the thread that predicts calls it.

        Raises:
            ClpError: No head is for it.
        """
        import torch

        self.check_task(instruction)
        head = self.heads[instruction]
        if head is self._now:
            return False
        start = time.perf_counter()
        state = self.policy.state_dict(keep_vars=True)
        with torch.no_grad():
            for name in {} if self._now is None else self._now.weights.keys() - head.weights.keys():
                state[name].data.copy_(self._base[name])
            for name, tensor in head.weights.items():
                state[name].data.copy_(tensor)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        self.preprocessor, self.postprocessor = head.preprocessor, head.postprocessor
        self.__dict__["normalisation"] = head.normalisation  # a cached property
        for name, value in head.config.items():
            setattr(self.policy.config, name, value)
        self._now = head
        if self._horizon is not None:
            super().enable_rtc(self._horizon)  # which refers to the processors, and forgets the last head's chunk
        self.switch_s = time.perf_counter() - start
        logging.getLogger(__name__).info("head of %r in %.1f ms", instruction, 1e3 * self.switch_s)
        return True

    @override
    def warm_up(self, task: str = "") -> None:
        super().warm_up(task or next(task for task, head in self.heads.items() if head is self._now))

    @override
    def enable_rtc(self, horizon: int) -> None:
        super().enable_rtc(horizon)
        self._horizon = horizon

    @override
    def predict_chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        noise: torch.Tensor | None = None,
        elapsed_steps: int | None = None,
        delay_steps: int = 0,
    ) -> np.ndarray:
        if self.switch(task):
            elapsed_steps = None  # the last chunk is another head's
        return super().predict_chunk(images, state, task, noise, elapsed_steps, delay_steps)


def load_task_heads(policy: LeRobotPolicy, heads: Mapping[str, Path], first: str) -> TaskHeads:
    """Adds heads to a loaded base, and takes the first one.

    Args:
        policy: The base. Do not use it any more: its weights are changed.
        heads: Head folders by instruction.
        first: The instruction whose head is taken.

    Raises:
        ClpError: A folder is not a head, belongs to another base, lacks statistics, or has other cameras or sizes than
            the first head; or no head is for ``first``.
    """
    made = TaskHeads(
        policy.checkpoint,
        policy.policy,
        policy.preprocessor,
        policy.postprocessor,
        policy.device,
        heads={task: _load(policy, Path(folder)) for task, folder in heads.items()},
    )
    state = policy.policy.state_dict()
    names = {name for head in made.heads.values() for name in head.weights}
    made._base = {name: state[name].clone() for name in names}
    made.switch(first)
    kinds = {task: _features(head) for task, head in made.heads.items()}
    for task, kind in kinds.items():
        if kind != kinds[first]:
            raise ClpError(
                f"the heads of {first!r} and {task!r} have other cameras, states or actions",
                where=heads[task],
                hint="run a node for each",
            )
    return made


def _load(policy: LeRobotPolicy, folder: Path) -> LoadedHead:
    from lerobot.configs.policies import PreTrainedConfig
    from safetensors.torch import load_file

    from clp_ros.policies.processors import load_processors
    from clp_ros.policies.quiet import quiet

    head = read_head(folder)
    check_base(head, policy.checkpoint, folder)
    head_tensors(folder, head)
    stored = load_file(folder / TENSORS_FILE)
    state = policy.policy.state_dict()
    weights = {}
    for name, other in head.names.items():
        if name not in state:
            raise ClpError(f"the model has no tensor {name}", where=folder, hint="extract the head again")
        weights[name] = stored[other].to(policy.device, state[name].dtype)
    with tempfile.TemporaryDirectory() as temporary, quiet():
        files = Path(temporary)
        copy_files(policy.checkpoint, folder, head, files, link=True)
        checkpoint: Checkpoint = dataclasses.replace(
            policy.checkpoint, path=files, config=read_json_object(files / CONFIG_FILE)
        )
        config = PreTrainedConfig.from_pretrained(files)
        preprocessor, postprocessor = load_processors(checkpoint, policy.device)
        own = LeRobotPolicy(checkpoint, policy.policy, preprocessor, postprocessor, policy.device)
        normalisation = own.normalisation
    if own.raw_features:
        own.checkpoint = dataclasses.replace(checkpoint, path=folder)  # for the error
        own.check_normalised()
    fields = {one.name for one in dataclasses.fields(config)} - _OF_THE_MACHINE
    return LoadedHead(
        weights, preprocessor, postprocessor, normalisation, {name: getattr(config, name) for name in sorted(fields)}
    )


def _features(head: LoadedHead) -> tuple[Any, ...]:
    return (
        head.config.get("input_features"),
        head.config.get("output_features"),
        head.normalisation.cameras,
        head.normalisation.output_size,
    )
