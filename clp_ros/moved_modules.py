# SPDX-License-Identifier: Apache-2.0
"""Old import paths, which keep working for one release with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old name -> new name, both inside clp_ros. Remove this file in 0.3.
MOVED = {
    "bags.images": "messages.images",
    "control.guard": "control.watchdog",
    "control.pace": "control.replan",
    "demo": "jobs.demo",
    "errors": "core.errors",
    "files": "core.files",
    "json_object": "core.json_object",
    "manifest": "checkpoints.manifest",
    "pruning.benchmark": "evaluation.benchmark",
    "pruning.calibration_file": "calibration.calibration_file",
    "pruning.distances": "calibration.distances",
    "pruning.flops": "evaluation.flops",
    "pruning.half_products": "calibration.half_products",
    "pruning.hidden_states": "calibration.hidden_states",
    "pruning.inspection": "jobs.inspect",
    "pruning.live_calibration": "calibration.live",
    "pruning.measurement": "evaluation.measurement",
    "pruning.processes": "core.processes",
    "pruning.prune": "jobs.prune",
    "pruning.similarity": "calibration.similarity",
    "pruning.verify": "evaluation.verify",
    "resources": "core.resources",
    "robots.episode": "datasets.episodes",
    "robots.features": "jobs.make_checkpoint",
    "robots.joint_states": "messages.joint_states",
    "robots.reservoir": "datasets.reservoir",
    "robots.stream": "messages.stamps",
    "settings": "core.settings",
    "simulation.controller": "robots.trajectory_controller",
    "strict_model": "core.strict_model",
    "vla.checkpoint": "policies.checkpoint",
    "vla.compilation": "policies.compilation",
    "vla.empty_weights": "policies.empty_weights",
    "vla.family": "policies.family",
    "vla.features": "policies.features",
    "vla.float32_products": "policies.float32_products",
    "vla.groot": "policies.groot.family",
    "vla.groot_n1_7": "policies.groot_n1_7.family",
    "vla.hub": "checkpoints.hub",
    "vla.layer_keys": "checkpoints.layer_keys",
    "vla.local_paths": "checkpoints.local_paths",
    "vla.normalisation": "policies.normalisation",
    "vla.not_a_checkpoint": "checkpoints.not_a_checkpoint",
    "vla.pi0": "policies.pi0.family",
    "vla.pi05": "policies.pi05.family",
    "vla.plugin": "policies.plugin",
    "vla.policy": "policies.lerobot_policy",
    "vla.processors": "policies.processors",
    "vla.quiet": "policies.quiet",
    "vla.random_weights": "policies.random_weights",
    "vla.replaced": "policies.patched",
    "vla.rtc": "policies.rtc",
    "vla.safetensors_header": "checkpoints.safetensors_header",
    "vla.smolvla": "policies.smolvla.family",
    "vla.statistics": "policies.statistics",
    "vla.tensor_check": "checkpoints.tensor_check",
    "vla.threads": "core.threads",
}
# Old names inside the modules above -> where each is now, as module:name.
RENAMED = {
    "control.guard": {"Finding": "control.watchdog:Fault", "Guard": "control.watchdog:Watchdog"},
    "control.pace": {"Pace": "control.replan:ReplanConfig", "Watch": "control.watchdog:WatchdogConfig"},
}
# Packages that hold none of their old modules any more.
_OLD_PACKAGES = {"vla": "policies"}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module of :data:`MOVED` as a copy of the new module's names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "clp_ros" or name not in MOVED.keys() | _OLD_PACKAGES.keys():
            return None
        return ModuleSpec(fullname, self, is_package=name in _OLD_PACKAGES)

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the usual empty module

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("clp_ros.")
        if old in _OLD_PACKAGES:
            return
        new = f"clp_ros.{MOVED[old]}"
        warnings.warn(
            f"clp_ros.{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=2
        )
        names = vars(importlib.import_module(new))
        kept = {name: value for name, value in names.items() if not name.startswith("__") or name == "__getattr__"}
        vars(module).update(kept)
        for name, where in RENAMED.get(old, {}).items():
            place, _, new_name = where.partition(":")
            vars(module)[name] = getattr(importlib.import_module(f"clp_ros.{place}"), new_name)


def install() -> None:
    """Lets the old names be imported."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())
