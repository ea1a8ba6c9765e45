# SPDX-License-Identifier: Apache-2.0
"""Describes a VLA family for calibration, selection, surgery and benchmark.

A family is one folder: ``family.py``, whose ``FAMILY`` the entry-point group ``clp_ros.policy_families`` names
(:mod:`clp_ros.policies.registry`), and ``synthetic.py``, which makes its random checkpoints. Importing ``family.py``
must not import torch, so that pruning a checkpoint stays as light as copying it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack, group_units
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.core.renamed import renamed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

    from clp_ros.policies.features import PolicyFeatures

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A VLA family. All callables that need torch or lerobot import them inside.

    Attributes:
        name: Its name on the command line and in files.
        recognises: Whether a config.json is of this family.
        layer_stacks: The prunable layer stacks of a checkpoint with this config. Raises ClpError on a config it cannot
            prune.
        with_depths: The config with new numbers of layers, by layer stack. Does not change its argument. Raises
            ClpError if the model needs more layers.
        with_widths: The config with the numbers of units inside of the layers that stay: by layer stack, for each
            layer, by kind. Stacks without :attr:`clp_ros.checkpoints.layer_stack.LayerStack.inner_units` are not in it.
        rewrite_local_paths: ``rewrite_local_paths(documents, folder, contents)`` rewrites, in place, every path in the
            top-level JSON files of a checkpoint (by file name) that points to something the checkpoint itself holds, so
            that it points into ``folder``. ``contents`` is the current folder of its files: ``folder``, or one that
            will be renamed to ``folder``. Processor steps that lerobot cannot run are replaced by the plugin's.
        default_ratio: Share of the layers removed when no budget is given, by group: the paper's Table 5.
        build: Builds the policy of a checkpoint folder for a device, without weights. It is called within
            :func:`clp_ros.policies.empty_weights.empty_weights`, which puts parameters on the meta device.
        forward: Runs the training-time graph once and returns each token's modality by layer stack: int8 (batch,
            tokens), values of :class:`clp_ros.policies.base.Modality`. Noise and time come from ``rng``.
        synthetic: The module, imported when a checkpoint is made, whose ``make_checkpoint(family, size, folder,
            features, seed)`` writes a seeded random checkpoint of the real classes into an empty folder.
        sizes: Sizes of its random checkpoints.
        policy: The package under ``lerobot.policies`` with its processor steps; empty: the family's name.
        lerobot: Versions of lerobot that have its classes, e.g. ``>=0.5.1,<0.6``. Empty: all versions that this package
            supports.
        wrapper: Prefix that lerobot adds to every tensor's name. Published checkpoints may lack it.
        tied: Tensors that the published model ties and lerobot stores separately: name -> name of the tied tensor.
            Parameter counts include one of the two. A checkpoint of lerobot 0.4 may have the first alone; one without
            ``wrapper`` may have either.
        unwrapped_name: Maps a tensor's name without ``wrapper`` to the name after lerobot's loading, also without
            ``wrapper``; or to None if lerobot leaves the tensor out. If the attribute is None, lerobot only adds
            ``wrapper``.
        refuse_names: Raises ClpError if no supported lerobot version can load tensors of these names.
        loads: Whether lerobot loads a checkpoint with this config as a policy. False for a layout that lerobot uses
            only as the base model of a fine-tuning.
        link_processors: ``link_processors(preprocessor, postprocessor)`` links steps that use each other, which their
            files do not record, and loads what they would load at their first use.
        denoise: Attribute path from the policy to the denoising step, which can be compiled.
        skips_absent_cameras: Whether lerobot's model runs without some cameras of its ``input_features``, as after
            fine-tuning for a robot with fewer cameras.
        ignores_padding: Whether the actions for an instruction are the same in a batch with a longer one.
        train_all: Fields of config.json with which lerobot trains all weights.
        train_expert: Fields of config.json with which lerobot trains the action expert and the projections only.
        output_projections: Prefixes of the model's parameters after the last layers, which make actions.
    """

    name: str
    recognises: Callable[[Config], bool]
    layer_stacks: Callable[[Config], tuple[LayerStack, ...]]
    with_depths: Callable[[Config, Mapping[str, int]], dict[str, Any]]
    rewrite_local_paths: Callable[[Mapping[str, dict[str, Any]], Path, Path], None]
    default_ratio: Mapping[str, float]
    build: Callable[[Path, str], PreTrainedPolicy]
    forward: Callable[[PreTrainedPolicy, dict[str, Any], np.random.Generator], dict[str, torch.Tensor]]
    synthetic: str
    sizes: tuple[str, ...] = ("tiny", "full")
    policy: str = ""
    lerobot: str = ""
    wrapper: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    unwrapped_name: Callable[[str], str | None] | None = None
    refuse_names: Callable[[Collection[str]], None] | None = None
    loads: Callable[[Config], bool] = lambda config: True
    link_processors: Callable[[Any, Any], None] | None = None
    denoise: str = "model.denoise_step"
    skips_absent_cameras: bool = False
    ignores_padding: bool = True
    with_widths: Callable[[Config, Mapping[str, Sequence[Mapping[str, int]]]], dict[str, Any]] | None = None
    train_all: Mapping[str, bool] = field(default_factory=dict)
    train_expert: Mapping[str, bool] = field(default_factory=dict)
    output_projections: tuple[str, ...] = ()

    def make_checkpoint(self, size: str, folder: Path, final: Path, features: PolicyFeatures, seed: int) -> None:
        """Writes a seeded random checkpoint of the real classes, which runs on any device.

        Args:
            size: ``tiny`` or ``full``, or ``small`` if the family has it.
            folder: An empty folder.
            final: What the folder will be renamed to.
            features: The cameras, state and actions of the policy.
            seed: Seed of the weights.
        """
        importlib.import_module(self.synthetic).make_checkpoint(self, size, folder, features, seed)

        def finish(documents: Mapping[str, dict[str, Any]]) -> None:
            self.rewrite_local_paths(documents, final, folder)
            if "device" in documents["config.json"]:
                documents["config.json"]["device"] = None

        rewrite_json(folder, finish)

    def default_budget(self, config: Config) -> dict[str, int]:
        """Returns the number of layers to remove from each group by default: the paper's share, rounded down.

        In a stack that was pruned before, the share may exceed what can be removed; it is then reduced.
        """
        budgets = {}
        for group, units in group_units(self.layer_stacks(config)).items():
            staying = max(len(units.protected | {0}), units.min_left)
            budgets[group] = min(int(units.count * self.default_ratio[group]), units.count - staying)
        return budgets


def check_depth(layers: object, what: str) -> int:
    """Returns the number of layers from a config.

    Raises:
        ClpError: It is not a positive whole number. The message begins with ``what``.
    """
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ClpError(f"{what} is {layers!r}", where="config.json", hint="write the number of layers there")
    return layers


def coupled_towers(vlm: str, expert: str, layers: int, period: int = 1) -> tuple[LayerStack, LayerStack]:
    """Returns the layer stacks of a VLM and an action expert with joint attention in each layer.

    Args:
        vlm: Attribute path from the policy to the VLM's ``layers`` and ``norm``. Only its keys and values are used, so
            the output of its last layer is unused.
        expert: The same of the expert.
        layers: Number of layers of each.
        period: Their ``pattern_period``.
    """

    def tower(name: str, path: str) -> LayerStack:
        return LayerStack(
            name=name,
            group="vlm+expert",
            layers=layers,
            layer_prefix=path + ".layers.{layer}.",
            layers_path=path + ".layers",
            norm_path=path + ".norm",
            pattern_period=period,
            last_output_unused=name == "vlm",
        )

    return tower("vlm", vlm), tower("expert", expert)


def check_lerobot(family: Family) -> None:
    """Refuses a family that the installed lerobot does not support.

    Raises:
        ClpError: Another version of lerobot is installed. The message names the one needed.
    """
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    installed = version("lerobot")
    if family.lerobot and not SpecifierSet(family.lerobot).contains(installed, prereleases=True):
        raise ClpError(
            f"{family.name} needs lerobot {family.lerobot}, but {installed} is installed",
            where="lerobot",
            hint=f'run `pip install "lerobot{family.lerobot}"` in a separate environment',
        )


__getattr__ = renamed(
    __name__, {name: f"policies.registry:{name}" for name in ("families", "family_named", "family_of")}
)
