# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, loaded strictly and ready to run: action chunks out of observations, hidden states out of layers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.hub import missing_repository
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.tensor_check import check_tensors
from clp_ros.core.errors import ClpError, NotHereError
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.checkpoint import CONFIG_FILE, PROCESSORS, Checkpoint
from clp_ros.policies.family import Family, check_lerobot
from clp_ros.policies.normalisation import Normalisation, normalise_by, read_normalisation
from clp_ros.policies.processors import load_processors, rename_map
from clp_ros.policies.quiet import quiet
from clp_ros.policies.statistics import ACTION, STATE, Statistics

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from clp_ros.policies.rtc import RealTimeChunking


@dataclass
class LoadedPolicy:
    """A policy with its processors.

    Attributes:
        checkpoint: What it was loaded from.
        policy: lerobot's policy, in evaluation mode.
        device: Where it runs, e.g. ``cpu`` or ``cuda``.
        statistics: Those given with :meth:`normalise_by`; None while they are the checkpoint's own.
        normalisation: What its processors normalise by.
        cameras: The camera features it is given, in its own order. From :meth:`check_features` on those that the robot
            has; before, those that have statistics, since it was trained on them, or else all.
        image_slots: All camera features of its config, in its own order.
        state_size: Length of ``observation.state``.
        action_size: Length of one action.
        chunk_size: Actions in a chunk.
    """

    checkpoint: Checkpoint
    policy: nn.Module
    preprocessor: Any
    postprocessor: Any
    device: str
    statistics: Statistics | None = field(default=None, init=False)
    _given_cameras: tuple[str, ...] = field(default=(), init=False)
    _rtc: RealTimeChunking | None = field(default=None, init=False, repr=False)

    @property
    def family(self) -> Family:
        """The family the checkpoint belongs to."""
        return self.checkpoint.family

    @property
    def modules(self) -> tuple[LayerStack, ...]:
        """The prunable modules."""
        return self.checkpoint.modules

    @cached_property
    def normalisation(self) -> Normalisation:
        """What its processors normalise by."""
        return read_normalisation(
            self.preprocessor, self.postprocessor, self.policy.config, rename_map(self.checkpoint)
        )

    @property
    def image_slots(self) -> tuple[str, ...]:
        """The camera features, in the policy's order, without those that lerobot itself leaves empty."""
        return tuple(slot for slot in self.policy.config.image_features if ".empty_camera_" not in slot)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The camera features it is given, in the policy's order."""
        trained = self._trained_cameras
        return self._given_cameras or tuple(slot for slot in self.image_slots if not trained or slot in trained)

    @property
    def left_out_cameras(self) -> tuple[str, ...]:
        """Camera features of its config that it is not given: lerobot's model runs without them."""
        return tuple(slot for slot in self.image_slots if slot not in self.cameras)

    @property
    def state_size(self) -> int:
        """Length of ``observation.state``: that of its statistics, since fine-tuning keeps the base's config entry."""
        return self.normalisation.sizes.get(STATE) or _size_of(self.policy.config, STATE, self.checkpoint.path)

    @property
    def action_size(self) -> int:
        """Length of one action: that of its statistics, or else of ``output_features``."""
        return self.normalisation.sizes.get(ACTION) or _size_of(self.policy.config, ACTION, self.checkpoint.path)

    @property
    def chunk_size(self) -> int:
        """Actions in a chunk."""
        return len(self.policy.config.action_delta_indices)  # as trained: a GR00T may have fewer than its chunk_size

    @property
    def _trained_cameras(self) -> frozenset[str]:
        """The cameras of the data set it was trained on; none where that is not known, or it cannot run without one."""
        if not self.family.skips_absent_cameras:
            return frozenset()
        return self.normalisation.cameras & frozenset(self.image_slots)

    def check_features(self, slots: Collection[str], action_size: int, whose: str) -> list[str]:
        """Refuses a robot that does not fit the policy, with both sides named; from then on its cameras are given.

        A camera of the policy's that the robot does not have is left out as lerobot leaves it out: where the family's
        model can run without, and the robot has at least one of the others.

        Args:
            slots: The robot's camera features.
            action_size: Number of the robot's joints.
            whose: The robot, for the error.

        Returns:
            What the user should know: one sentence a camera that is left out, or that the policy was not trained on.

        Raises:
            ClpError: The cameras or the sizes differ.
        """
        notes = self.check_cameras(slots, whose)
        # Without statistics the state's size is the base model's, which lerobot pads, and never looks at.
        padded = STATE not in self.normalisation.sizes and action_size <= getattr(
            self.policy.config, "max_state_dim", 0
        )
        if self.action_size != action_size or (self.state_size != action_size and not padded):
            raise ClpError(
                f"the policy's state has {self.state_size} and its action {self.action_size} components; "
                f"{whose} has {action_size} joints",
                where=self.checkpoint.path,
                fix="use a checkpoint that was trained for this embodiment"
                if not self.normalisation.missing
                else "fine-tune it for this robot first; to calibrate it as it is, give --statistics",
            )
        return notes

    def check_cameras(self, slots: Collection[str], whose: str) -> list[str]:
        """The part of :meth:`check_features` that is about cameras."""
        absent = set(self.image_slots) - set(slots)
        if set(slots) - set(self.image_slots) or not slots or (absent and not self.family.skips_absent_cameras):
            raise ClpError(
                f"the policy's cameras are {', '.join(sorted(self.image_slots)) or 'none'}; "
                f"{whose} has {', '.join(sorted(slots)) or 'none'}",
                where=self.checkpoint.path,
                fix="give each camera the policy's feature that it feeds, in the embodiment",
            )
        self._given_cameras = tuple(slot for slot in self.image_slots if slot in slots)
        trained, notes = self._trained_cameras, []
        for slot in self.left_out_cameras:
            known = ", though the policy was trained with it" if slot in trained else ""
            notes.append(f"the camera {slot} is left out: {whose} does not have it{known}")
        notes += [
            f"the policy was not trained with the camera {slot}: its statistics do not name it"
            for slot in self.cameras
            if trained and slot not in trained
        ]
        return notes

    def normalise_by(self, statistics: Statistics) -> None:
        """Normalises state and actions by other statistics than the checkpoint's, which may have none.

        Raises:
            ClpError: They lack what the policy normalises by, do not fit its size, or its processors take none.
        """
        config, where = self.policy.config, self.checkpoint.path
        for feature, width in ((STATE, "max_state_dim"), (ACTION, "max_action_dim")):
            most = getattr(config, width, None)
            size = statistics.size(feature)
            if most is not None and size > most:
                raise ClpError(
                    f"the statistics of {feature} have {size} components, the policy takes at most {most}",
                    where=where,
                    fix="use the statistics of this robot's data, or another checkpoint",
                )
        if not normalise_by(self.preprocessor, self.postprocessor, config, statistics):
            raise ClpError(
                f"{self.family.name}'s processors take no statistics",
                where=where,
                fix="calibrate it without --statistics",
            )
        self.statistics = statistics
        vars(self).pop("normalisation", None)  # read anew
        self._check_complete()

    def describe_statistics(self) -> dict[str, Any]:
        """Where its statistics come from, for JSON: ``source`` (``checkpoint``, ``dataset``, ``bags`` or ``none``).

        With ``raw``, the features that lerobot does not normalise for want of them, and the ``values`` of those given.
        """
        if self.statistics is not None:
            return self.statistics.describe()
        raw = list(self.normalisation.missing)
        return {"source": "none", "raw": raw} if raw else {"source": "checkpoint"}

    def check_normalised(self) -> None:
        """Refuses a policy that would be given raw joint positions, and whose actions would be taken for raw ones.

        Raises:
            ClpError: Its normaliser has no statistics for the state or the actions.
        """
        self._check_complete()
        if self.normalisation.missing:
            raise ClpError(
                raw_values(self.normalisation.missing),
                where=self.checkpoint.path,
                fix="fine-tune it with lerobot-train --policy.path=…, which saves the data set's statistics with it",
            )

    def _check_complete(self) -> None:
        for feature, lacking in self.normalisation.incomplete.items():
            raise ClpError(
                f"{self.normalisation.modes[feature]} needs the statistics {', '.join(lacking)} of {feature}, "
                "which are not there",
                where=self.checkpoint.path,
                fix="add them to the data set (lerobot's augment_dataset_quantile_stats.py); "
                "calibrating goes without with --statistics bags",
            )

    def batch(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        actions: np.ndarray | None = None,
        action_is_pad: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """One sample as a batch of the policy's own, through its preprocessor.

        Args:
            images: (height, width, 3) uint8 RGB, by slot; all of :attr:`cameras`.
            state: (state_size,) float.
            task: The instruction.
            actions: (chunk_size, action_size) float, for the training-time graph.
            action_is_pad: (chunk_size,) bool.

        Raises:
            ClpError: A camera is missing, or statistics that lerobot cannot do without.
        """
        import numpy as np
        import torch

        self._check_complete()
        missing = sorted(set(self.cameras) - set(images))
        if missing:
            raise ClpError(f"no image for {missing[0]}", where=self.checkpoint.path, fix="connect that camera")
        sample: dict[str, Any] = {"task": [task]}
        for slot in self.cameras:
            pixels = torch.from_numpy(np.ascontiguousarray(images[slot])).permute(2, 0, 1)
            sample[slot] = pixels.unsqueeze(0).to(torch.float32) / 255.0
        sample[STATE] = torch.as_tensor(state, dtype=torch.float32).unsqueeze(0)
        if actions is not None:
            sample["action"] = torch.as_tensor(actions, dtype=torch.float32).unsqueeze(0)
        batch = self.preprocessor(sample)
        if action_is_pad is not None:
            batch["action_is_pad"] = torch.as_tensor(action_is_pad).unsqueeze(0).to(self.device)
        return batch

    def enable_rtc(self, horizon: int) -> None:
        """Lets the policy continue its last chunk: real-time chunking (arXiv 2506.07339), as lerobot has it.

        Args:
            horizon: Steps of the last chunk that guide the next, at least: see :mod:`clp_ros.policies.rtc`.

        Raises:
            ClpError: lerobot has none for this policy.
        """
        from clp_ros.policies.rtc import RealTimeChunking

        try:
            self._rtc = RealTimeChunking(self.policy, self.preprocessor, self.postprocessor, horizon, self.family.name)
        except ClpError as error:
            raise ClpError(error.what, where=self.checkpoint.path, fix=error.fix) from error

    def predict_chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        task: str,
        noise: torch.Tensor | None = None,
        elapsed_steps: int | None = None,
        delay_steps: int = 0,
    ) -> np.ndarray:
        """Predicts an action chunk.

        Args:
            images: (height, width, 3) uint8 RGB, by slot.
            state: (state_size,) float.
            task: The instruction.
            noise: Where the flow starts, in the policy's own shape; drawn when not given.
            elapsed_steps: After :meth:`enable_rtc`: continue the last chunk, of which so many steps have passed.
            delay_steps: Steps of it that will have been executed by the time this chunk is there: they are kept.

        Returns:
            (chunk_size, action_size) float32, in the units the policy was trained on.

        Raises:
            ClpError: A camera is missing, or the statistics do not fit the actions: lerobot fails then too.
        """
        import torch

        given: dict[str, Any] = {} if noise is None else {"noise": noise}  # not every policy takes one
        # Not inference_mode with real-time chunking, whose guidance takes gradients.
        with torch.inference_mode() if self._rtc is None else torch.no_grad():
            batch = self.batch(images, state, task)
            if self._rtc is not None and elapsed_steps is not None:
                given |= self._rtc.guidance(elapsed_steps, delay_steps)
            chunk = self.policy.predict_action_chunk(batch, **given)
            self._check_actions(chunk.shape[-1])
            made = chunk.clone()
            actions = self.postprocessor(chunk)
            if self._rtc is not None:
                self._rtc.remember(made, actions)
            return actions[0].to("cpu", torch.float32).numpy()

    def _check_actions(self, width: int) -> None:
        """Refuses what lerobot 0.4 made of a base model's checkpoint: the base's ``output_features`` stayed."""
        if self.normalisation.output_size not in (None, width):
            raise ClpError(
                f"its actions have {width} components, their statistics {self.normalisation.output_size}",
                where=self.checkpoint.path,
                fix="write the statistics' number into the shape of output_features in config.json",
            )

    def warm_up(self, task: str = "warm up") -> None:
        """Predicts one chunk from blank pictures, so that the first real one is not the slow one."""
        import numpy as np

        features = self.policy.config.image_features
        images = {slot: np.zeros((*features[slot].shape[1:], 3), dtype=np.uint8) for slot in self.cameras}
        self.predict_chunk(images, np.zeros(self.state_size, dtype=np.float32), task)

    def hidden_states(
        self, batch: dict[str, Any], rng: np.random.Generator
    ) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
        """Runs the training-time graph once and reads every prunable layer's output (paper, section 3: H_ℓ).

        Args:
            batch: From :meth:`batch`, with actions.
            rng: Source of the flow's noise and time.

        Returns:
            By module name: the hidden states, (batch, tokens, dim) a layer in order; and which tokens are not padding,
            bool (batch, tokens).
        """
        import torch

        from clp_ros.policies.float32_products import fast_products

        with torch.inference_mode(), fast_products(self.device), _recorded(self.policy, self.modules) as states:
            masks = self.family.forward(self.policy, batch, rng)
        for module in self.modules:
            if len(states[module.name]) != module.layers or None in states[module.name]:
                raise RuntimeError(f"not every layer of {module.name} ran: the family's probes do not fit this lerobot")
        return states, masks


def raw_values(features: Collection[str]) -> str:
    """The sentence for features that lerobot does not normalise, though the policy was trained on normalised ones."""
    names = " and ".join(features)
    return f"no statistics for {names}: lerobot uses raw values, which the policy was not trained on"


@contextlib.contextmanager
def _recorded(policy: nn.Module, modules: Collection[LayerStack]) -> Iterator[dict[str, list[Any]]]:
    """Records the output of every layer: the input of the next one, and of the norm after the last."""
    states: dict[str, list[Any]] = {module.name: [None] * module.layers for module in modules}
    handles = []
    try:
        for module in modules:
            layers = policy.get_submodule(module.layers_path)

            def keep(state: torch.Tensor, index: int, name: str = module.name) -> None:
                states[name][index] = state.detach().clone()  # some models add to this tensor in place later

            if module.probe is None:
                for index, layer in enumerate(layers):

                    def after(_: Any, __: Any, output: Any, index: int = index, keep: Any = keep) -> None:
                        keep(output[0] if isinstance(output, tuple) else output, index)

                    handles.append(layer.register_forward_hook(after))
                continue
            probes = [layer.get_submodule(module.probe) for layer in layers[1:]]
            for index, probe in enumerate([*probes, policy.get_submodule(module.norm_path)]):

                def before(_: Any, inputs: tuple[Any, ...], index: int = index, keep: Any = keep) -> None:
                    keep(inputs[0], index)

                handles.append(probe.register_forward_pre_hook(before))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def resolve_device(device: str) -> str:
    """The device ``auto`` stands for: CUDA where there is one, otherwise the CPU.

    Raises:
        ClpError: The device is not known, or not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ClpError(f"unknown device {device!r}", fix="use auto, cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ClpError(
            f"the device {device!r} is not there", fix="use a GPU that is there (with a CUDA build of torch), or cpu"
        )
    return device


def load_policy(
    folder: str | Path, device: str = "auto", dtype: str = "auto", mapped: bool = False, weights: bool = True
) -> LoadedPolicy:
    """Loads a checkpoint strictly with lerobot's own classes, offline where the folder holds all it needs.

    Args:
        folder: The checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as lerobot loads it) or ``float32``.
        mapped: Leave weights that have the model's dtype in their files, memory-mapped: they take memory that the
            system can take back at any time, so that a model larger than the memory runs, if slowly. On the CPU only.
            The last bits of results may differ, since kernels depend on where in memory the weights begin.
        weights: Whether to load them. Without, they are :func:`clp_ros.policies.empty_weights.fake_weights`, on the
            CPU.

    Raises:
        ClpError: The folder is not a whole checkpoint of a known family, or does not fit lerobot's model.
    """
    from clp_ros.policies.empty_weights import assign_weights, fake_weights

    checkpoint = Checkpoint.open(Path(folder))
    check_lerobot(checkpoint.family)
    device = resolve_device(device) if weights else "cpu"
    if dtype not in ("auto", "float32"):
        raise ClpError(f"unknown dtype {dtype!r}", fix="use auto or float32")
    with quiet():
        policy = build_model(checkpoint.family, checkpoint.path, device)
        _size_of(policy.config, ACTION, checkpoint.path)  # lerobot's models ask for it with every chunk
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        check_tensors(policy, checkpoint.model_names, shapes, checkpoint.path)
        if dtype == "float32":
            policy.float()
        if weights:
            assign_weights(policy, _read_tensors(checkpoint), copy=device == "cpu" and not mapped)
            policy.to(device)
        else:
            fake_weights(policy)
        policy.eval()
        files = [checkpoint.path / name for name in PROCESSORS]
        with _told("its processors do not load", checkpoint.path, "save them again with this lerobot", *files):
            preprocessor, postprocessor = load_processors(checkpoint, device)
    return LoadedPolicy(checkpoint, policy, preprocessor, postprocessor, device)


def _size_of(config: Any, feature: str, where: Path) -> int:
    """The size of the state or the action in a policy's config.

    Raises:
        ClpError: The config does not have the feature.
    """
    field, found = {
        STATE: ("input_features", config.robot_state_feature),
        ACTION: ("output_features", config.action_feature),
    }[feature]
    if found is None or not found.shape:
        raise ClpError(
            f"there is no {feature} among its {field}",
            where=where / CONFIG_FILE,
            fix="write it there, with its type and shape",
        )
    return found.shape[0]


def build_model(family: Family, folder: Path, device: str, where: Path | None = None) -> nn.Module:
    """Builds lerobot's policy of a checkpoint on the meta device: no weights are read.

    Args:
        family: The checkpoint's family.
        folder: The folder with its config.json and whatever that points to.
        device: Where the policy will run, by name.
        where: The checkpoint's folder, for the error; ``folder`` where it is not given.

    Raises:
        ClpError: lerobot cannot build it.
    """
    from clp_ros.policies.empty_weights import empty_weights

    where = where or folder
    told = _told(
        "lerobot cannot build its model", where, "check config.json and what it points to", folder / CONFIG_FILE
    )
    with told, empty_weights():
        return family.build(folder, device)


def _read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    weights = {}
    for file in checkpoint.weight_files:
        with safe_open(checkpoint.path / file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        checkpoint.check_unchanged(file)
    return {name: weights[stored] for name, stored in checkpoint.model_names.items()}


@contextlib.contextmanager
def _told(what: str, where: object, fix: str, *files: Path) -> Iterator[None]:
    """Tells whatever a library finds wrong with the files it is given as a ClpError.

    ``files`` are the JSON files that may name what is missing.
    """
    try:
        yield
    except ClpError:
        raise
    except Exception as error:  # lerobot, draccus, transformers and the hub each have exceptions of their own
        if missing := missing_repository(error, *map(read_json_object, files)):
            raise NotHereError(missing.what, where=where, fix=missing.fix) from error
        raise ClpError(f"{what} ({type(error).__name__}: {error})", where=where, fix=fix) from error
