# SPDX-License-Identifier: Apache-2.0
"""Success of checkpoints in LeRobot's environments, such as LIBERO, with LeRobot's own rollouts.

The policy acts as in ``lerobot-eval``: one action a step, without latency and without the node's chunk control.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros import __version__
from clp_ros.checkpoints.hub import local_folder
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean
from clp_ros.evaluation.evaluate import PolicyOutcomes
from clp_ros.evaluation.evaluation_folder import EvaluationFolder
from clp_ros.evaluation.outcome import EpisodeOutcome
from clp_ros.policies.checkpoint import Checkpoint

if TYPE_CHECKING:
    from clp_ros.policies.lerobot_policy import LeRobotPolicy

_IMAGES = "observation.images."
_GUIDE = "see doc/how-to/libero.md"


@dataclass(frozen=True)
class EnvPlan:
    """What is played, the same for all checkpoints.

    Attributes:
        type: Type of the environment, as ``--env.type`` of lerobot-eval.
        task: Its task or suite, as ``--env.task``.
        options: Other fields of the environment's config, as ``--env.NAME``.
        episodes: Number of episodes of each task.
        seed: Seed of the first episode.
        batch: Number of copies of an environment that are stepped together.
        asynchronous: Whether each copy has a process of its own.
        action_steps: Steps that are executed of each chunk; None: the checkpoint's ``n_action_steps``.
        device: The policies' device.
    """

    type: str
    task: str
    options: Mapping[str, Any]
    episodes: int
    seed: int
    batch: int
    asynchronous: bool
    action_steps: int | None
    device: str

    def document(self) -> dict[str, Any]:
        """Returns what must be the same when an evaluation goes on."""
        plan = dataclasses.asdict(self)
        return {"clp_ros": __version__, **{name: plan[name] for name in plan if name not in ("asynchronous", "device")}}

    def config(self) -> Any:
        """Returns LeRobot's config of the environment.

        Raises:
            ClpError: The type or an option is unknown, or a package is missing.
        """
        from lerobot.envs.configs import EnvConfig
        from lerobot.utils.import_utils import register_third_party_plugins

        register_third_party_plugins()
        known = list(EnvConfig.get_known_choices())
        if self.type not in known:
            raise ClpError(f"lerobot has no environment {self.type!r}", hint=did_you_mean(self.type, known))
        config = EnvConfig.get_choice_class(self.type)
        names = [one.name for one in dataclasses.fields(config) if one.init]
        if unknown := [name for name in self.options if name not in names]:
            raise ClpError(
                f"{self.type} has no option {unknown[0]!r}", where="env-option", hint=did_you_mean(unknown[0], names)
            )
        if self.type.startswith("libero"):
            check_libero()
        return config(task=self.task, **self.options)


def check_libero() -> None:
    """Refuses a LIBERO that is not set up: its import would ask for paths on the terminal, or download its meshes.

    Raises:
        ClpError: A package, the config file or the meshes are missing.
    """
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise ClpError("LIBERO is not installed", where="libero", hint=_GUIDE)
    config = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    if not config.is_file():
        raise ClpError("LIBERO's configuration is missing", where=config, hint=f"set LIBERO_CONFIG_PATH; {_GUIDE}")
    own = Path(next(iter(found.submodule_search_locations)), "libero", "assets")
    if not (own / "scenes").is_dir() and not Path("~/.cache/libero/assets/scenes").expanduser().is_dir():
        raise ClpError("LIBERO's meshes are missing", where=own, hint=_GUIDE)


def evaluate_in_env(
    checkpoints: Sequence[Path],
    plan: EnvPlan,
    folder: EvaluationFolder | None = None,
    stage: Callable[[str, str], None] = lambda title, unit: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[PolicyOutcomes]:
    """Plays all episodes of all checkpoints, with LeRobot's rollouts.

    Args:
        checkpoints: Checkpoints' folders.
        plan: What is played.
        folder: Where outcomes are kept. A task that it has is not played again. None: they are kept in memory.
        stage: Called with the name of a stage and the unit of ``advance``.
        advance: Called with the number of episodes done and in total.

    Raises:
        ClpError: A checkpoint does not load, its cameras are not the environment's, or a package is missing.
    """
    from clp_ros.policies.loading import load_policy

    config = plan.config()
    found: list[PolicyOutcomes] = []
    seeds = list(range(plan.seed, plan.seed + plan.episodes))
    for given in checkpoints:
        path = local_folder(given)
        fingerprint = Checkpoint.open(path).fingerprint()
        stage(f"loading {given}", "")
        policy = load_policy(path, plan.device)
        _fit(policy, plan, config)
        if folder is not None and folder.policy(fingerprint) is None:
            folder.add_policy(fingerprint, {"path": str(path)})
        outcomes: list[EpisodeOutcome] = []
        total: dict[str, float] = {"policy": 0.0, "environment": 0.0}
        # A new environment for each checkpoint, because the starts of some depend on what was played before.
        environments = _environments(config, plan)
        tasks = [(suite, index, env) for suite, envs in environments.items() for index, env in envs.items()]
        stage(f"playing {given}", "episode")
        try:
            for number, (suite, index, env) in enumerate(tasks):
                name = f"{suite}-{index}"
                block = None if folder is None else folder.block(fingerprint, name, seeds)
                if block is None:
                    played, seconds, pictures = _play(policy, env, config, plan, name, seeds)
                    block = played, seconds
                    if folder is not None:
                        folder.add_block(fingerprint, name, played, seconds, pictures)
                outcomes += block[0]
                total = {key: total[key] + block[1][key] for key in total}
                advance((number + 1) * plan.episodes, len(tasks) * plan.episodes)
        finally:
            for _, _, env in tasks:
                env.close()
        found.append(
            PolicyOutcomes(
                path=str(given),
                fingerprint=fingerprint,
                latency_ms=None,
                outcomes=outcomes,
                seconds={key: round(value, 3) for key, value in total.items()},
            )
        )
    return found


def _fit(policy: LeRobotPolicy, plan: EnvPlan, config: Any) -> None:
    """Checks that a policy fits the environment, and sets how many steps of its chunks are executed."""
    features = getattr(config, "features_map", {})
    cameras = [
        features[key]
        for key, feature in config.features.items()
        if key in features and feature.type.value == "VISUAL" and features[key].startswith(_IMAGES)
    ]
    if cameras:
        policy.check_cameras(cameras, f"{plan.type}:{plan.task}")
    policy.check_normalised()
    if plan.action_steps is not None:
        if not 1 <= plan.action_steps <= policy.chunk_size:
            raise ClpError(
                f"{plan.action_steps} steps cannot be executed of chunks of {policy.chunk_size}",
                where=policy.path,
                hint="give another --replan-steps",
            )
        policy.policy.config.n_action_steps = plan.action_steps


def _environments(config: Any, plan: EnvPlan) -> dict[str, dict[int, Any]]:
    from lerobot.envs.factory import make_env

    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        # Environments print what they do, and stdout is for results.
        with redirect_stdout(sys.stderr):
            return make_env(config, n_envs=plan.batch, use_async_envs=plan.asynchronous)
    except ImportError as error:
        raise ClpError(
            f"the environment {plan.type} needs a package that is missing ({error})",
            where=error.name,
            hint=f"install it; {_GUIDE}",
        ) from error


def _play(
    policy: LeRobotPolicy, env: Any, config: Any, plan: EnvPlan, name: str, seeds: Sequence[int]
) -> tuple[list[EpisodeOutcome], dict[str, float], dict[int, list[np.ndarray]]]:
    """Plays all episodes of a task."""
    import torch
    from lerobot.envs.factory import make_env_pre_post_processors
    from lerobot.scripts.lerobot_eval import rollout

    before, after = make_env_pre_post_processors(config, policy.policy.config)
    outcomes: list[EpisodeOutcome] = []
    pictures: dict[int, list[np.ndarray]] = {}
    timed = _Timed(policy.policy.select_action)
    begun = time.perf_counter()
    torch.manual_seed(seeds[0])
    vars(policy.policy)["select_action"] = timed
    try:
        for first in range(0, len(seeds), plan.batch):
            batch = seeds[first : first + plan.batch]
            # The last batch may be smaller than the environment, which then plays episodes that are not counted.
            every = [*batch, *range(seeds[-1] + 1, seeds[-1] + 1 + plan.batch - len(batch))]
            watch = _Watch(before)
            amp = getattr(policy.policy.config, "use_amp", False)
            autocast = torch.autocast(torch.device(policy.device).type) if amp else nullcontext()
            # LeRobot draws progress bars of its own.
            with torch.no_grad(), autocast, redirect_stdout(sys.stderr), redirect_stderr(io.StringIO()):
                result = rollout(env, policy.policy, watch, after, policy.preprocessor, policy.postprocessor, every)
            for number, seed in enumerate(batch):
                done = result["done"][number].numpy()
                steps = int(done.argmax()) + 1 if done.any() else len(done)
                success = bool(result["success"][number].numpy()[:steps].any())
                outcomes.append(
                    EpisodeOutcome(
                        task=name,
                        seed=seed,
                        success=success,
                        seconds=round(steps / config.fps, 3),
                        start=watch.starts[number],
                        instruction=watch.tasks[number],
                    )
                )
                pictures[seed] = watch.pictures(number, steps)
    finally:
        del vars(policy.policy)["select_action"]
    whole = time.perf_counter() - begun
    seconds = {"policy": round(timed.seconds, 3), "environment": round(whole - timed.seconds, 3)}
    return outcomes, seconds, {seed: taken for seed, taken in pictures.items() if taken}


class _Timed:
    """Measures the time of a policy's calls."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        result = self._call(*arguments, **named)
        self.seconds += time.perf_counter() - begun
        return result


class _Watch:
    """Stands before the environment's preprocessor, and keeps the first observation's hash, and pictures.

    Attributes:
        starts: A hash of each copy's first observation and instruction.
        tasks: The instruction of each copy.
    """

    def __init__(self, preprocessor: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._preprocessor = preprocessor
        self._seen: list[np.ndarray] = []
        self.starts: list[str] = []
        self.tasks: list[str] = []

    def __call__(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Returns what the preprocessor makes of a batch of observations."""
        if not self.starts:
            self.tasks = [str(task) for task in observation["task"]]
            self.starts = [self._hash(observation, number) for number in range(len(self.tasks))]
        # The preprocessor of some environments turns the pictures upright.
        processed = self._preprocessor(observation)
        camera = next((key for key in processed if key.startswith("observation.image")), None)
        if camera is not None:
            self._seen.append((processed[camera].permute(0, 2, 3, 1).cpu().numpy() * 255).astype(np.uint8))
        return processed

    def _hash(self, observation: Mapping[str, Any], number: int) -> str:
        digest = hashlib.sha256(self.tasks[number].encode())
        for key, value in sorted(_flat(observation)):
            if hasattr(value, "numpy"):
                digest.update(key.encode() + np.round(value[number].double().numpy(), 5).tobytes())
        return digest.hexdigest()[:12]

    def pictures(self, number: int, steps: int) -> list[np.ndarray]:
        """Returns the first and last picture of a copy's episode of some steps."""
        if not self._seen:
            return []
        return [self._seen[0][number], self._seen[min(steps, len(self._seen)) - 1][number]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return found
