# SPDX-License-Identifier: Apache-2.0
"""Runs a policy on frames of demonstrations and compares the hidden states of its layers.

Paper, section 4 and algorithm 1, lines 2-5. In several processes, each with a part of the frames:
``torchrun --nproc-per-node N -m clp_ros.cli calibrate`` with the arguments of ``clp calibrate``.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros import __version__
from clp_ros.bags.reader import BagReader, open_bag
from clp_ros.calibration.calibration_file import Calibration
from clp_ros.core import processes
from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import EpisodeTicks, Frame, LeftOut, Steps, read_frames, usable_ticks
from clp_ros.policies.statistics import Statistics, compute_statistics, read_dataset_statistics
from clp_ros.robots.embodiment import Embodiment

if TYPE_CHECKING:
    import torch

    from clp_ros.policies.base import HiddenStates, Policy

# Means: use the statistics of the calibration episodes.
BAGS = "bags"

# Number of tokens of a layer stack by which all pairs of layers are compared. It bounds their work and memory.
MATRIX_TOKENS = 2048


def check_seed(seed: int) -> None:
    """Refuses a negative seed, which NumPy does not accept."""
    if seed < 0:
        raise ClpError(f"the seed is {seed}", where="seed", hint="use 0 or a positive number")


class Calibrator:
    """Runs frames through a policy and adds its layers' hidden states to running sums. Memory does not grow with the
    frames.

    Adjacent layers are compared over all tokens. All pairs of layers are compared over at most :data:`MATRIX_TOKENS`
    tokens of a layer stack, drawn evenly from the frames: all tokens would take half the time of the policy.

    Args:
        policy: The policy.
        task: The instruction.
        seed: Seed of each frame's noise and time, and of its tokens for the comparison of all pairs.
        frames: Maximum number of frames that will be added.

    Raises:
        ClpError: The seed is negative.
    """

    def __init__(self, policy: Policy, task: str, seed: int = 0, frames: int = 64) -> None:
        from clp_ros.calibration.distances import AdjacentDistances
        from clp_ros.calibration.similarity import LinearCKA

        check_seed(seed)
        self.policy = policy
        self.task = task
        self.seed = seed
        self.frames = frames
        self.samples = 0
        self.tokens = {module.name: 0 for module in policy.layer_stacks}
        self._adjacent: dict[str, LinearCKA] = {}
        self._all: dict[str, LinearCKA] = {}
        self._distances: dict[str, AdjacentDistances] = {}
        for module in policy.layer_stacks:
            given: dict[str, Any] = {"name": module.name, "device": policy.device}
            # For half-precision states only. All others are multiplied and summed in float64.
            self._adjacent[module.name] = LinearCKA(module.layers, pairs="adjacent", products="float32", **given)
            self._all[module.name] = LinearCKA(module.layers, **given)
            self._distances[module.name] = AdjacentDistances(module.layers, **given)

    def add(self, frame: Frame, index: int | None = None, task: str | None = None) -> None:
        """Adds one frame: one forward pass of the training-time graph, with noise and time seeded for this frame.

        Args:
            frame: The frame.
            index: The frame's number among all drawn frames, which seeds it; by default the number of frames added so
                far.
            task: The frame's instruction; None: the calibrator's.

        Raises:
            ClpError: A hidden state is not finite. The message names the layer.
        """
        index = self.samples if index is None else index
        observation = frame.observation
        task = self.task if task is None else task
        batch = self.policy.batch(observation.images, observation.state, task, frame.actions, frame.action_is_pad)
        self.add_states(self.policy.hidden_states(batch, np.random.default_rng([self.seed, index])), index)

    def add_states(self, states: dict[str, HiddenStates], index: int) -> None:
        """Adds the hidden states of one frame from :meth:`Policy.hidden_states`, and empties the lists to free
        memory."""
        for one in states.values():
            one.layers[:] = [state[one.mask] for state in one.layers]
        _check_finite({name: one.layers for name, one in states.items()})
        for number, name in enumerate(list(states)):
            hidden = states.pop(name).layers
            self._adjacent[name].update(hidden)
            self._distances[name].update(hidden)
            chosen = self._choose(len(hidden[0]), index, number)
            self._all[name].update(hidden if chosen is None else [state[chosen] for state in hidden])
            self.tokens[name] += len(hidden[0])
        self.samples += 1

    def _choose(self, tokens: int, index: int, module: int) -> np.ndarray | None:
        """Returns the tokens of a frame by which all pairs of layers are compared; None: all tokens.

        The result depends on the frame alone, so that it is the same in every process.
        """
        share = (index + 1) * MATRIX_TOKENS // self.frames - index * MATRIX_TOKENS // self.frames
        if tokens <= share:
            return None
        return np.sort(np.random.default_rng([self.seed, index, module]).choice(tokens, share, replace=False))

    def all_reduce(self) -> None:
        """Sums the results of all processes, in every process."""
        if processes.world_size() == 1:
            return
        for sums in (self._adjacent, self._all, self._distances):
            for one in sums.values():
                one.all_reduce()
        taken = processes.gather((self.samples, self.tokens))
        self.samples = sum(samples for samples, _ in taken)
        self.tokens = {name: sum(tokens[name] for _, tokens in taken) for name in self.tokens}

    def finish(self, source: dict[str, Any]) -> Calibration:
        """Returns the calibration over all added frames.

        Args:
            source: The origin of the frames, for calibration.json: ``bags``, ``embodiment``, ``episodes``, …

        Raises:
            ClpError: There were no frames.
        """
        if not self.samples:
            raise ClpError(
                "no frame could be used",
                where=", ".join(bag["path"] for bag in source.get("bags", ())) or None,
                hint="record a longer demonstration, or loosen the sync of the topics",
            )
        meta = {
            "checkpoint": {"path": str(self.policy.path), "fingerprint": self.policy.fingerprint()},
            "family": self.policy.family_name,
            "task": self.task,
            **source,
            "cameras": list(self.policy.cameras),
            "left_out_cameras": list(self.policy.left_out_cameras),
            "statistics": self.policy.describe_statistics(),
            "samples": self.samples,
            "tokens": self.tokens,
            "matrix_tokens": {name: sums.tokens for name, sums in self._all.items()},
            "seed": self.seed,
            "dtype": self.policy.dtype,
            "device": self.policy.device,
            "versions": {
                "clp_ros": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("lerobot", "torch", "transformers", "numpy")},
            },
            "modules": {
                module.name: {
                    "layers": module.layers,
                    "group": module.group,
                    "period": module.pattern_period,
                    "dead_last": module.last_output_unused,
                    "fixed": sorted(module.protected_layers),
                    "least": module.min_layers,
                }
                for module in self.policy.layer_stacks
            },
        }
        matrices = {name: sums.matrix() for name, sums in self._all.items()}
        for name, matrix in matrices.items():
            layers = np.arange(len(matrix) - 1)
            matrix[layers, layers + 1] = matrix[layers + 1, layers] = self._adjacent[name].adjacent()
        return Calibration(
            meta,
            matrices,
            {name: sums.mse() for name, sums in self._distances.items()},
            {name: sums.cosine() for name, sums in self._distances.items()},
        )


def _check_finite(hidden: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Raises an error for the first layer with NaN or infinity. If stacks attend to each other, all later layers have
    them too."""
    from clp_ros.calibration.hidden_states import first_not_finite, not_finite

    firsts = {name: first_not_finite(states) for name, states in hidden.items()}
    faults = [(layer, name) for name, layer in firsts.items() if layer is not None]
    if faults:
        layer, name = min(faults)
        raise not_finite(name, layer)


def calibrate_bags(
    policy: Policy,
    bags: Sequence[str | Path],
    embodiment: Embodiment,
    task: str | Sequence[str],
    samples: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    scanned: Callable[[int, int], None] | None = None,
    *,
    statistics: Statistics | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Calibration:
    """Calibrates on frames drawn from all episodes of some bags. Each bag is one episode.

    In a :func:`clp_ros.core.processes.process_group`, each process runs a part of the frames, and all return the
    calibration over all frames.

    Args:
        policy: The policy; its features must fit the embodiment.
        bags: rosbag2 recordings.
        embodiment: The robot they were recorded with.
        task: The instruction, or one for each bag.
        samples: Number of frames; fewer if the bags have fewer usable control ticks.
        seed: Seed of the drawn frames, and of each frame's noise and time.
        progress: Called with (frames done, frames drawn) of this process, after the scan and after each frame.
        scanned: Called with (seconds scanned, seconds of all bags) during the scan for usable control ticks, which
            comes first.
        statistics: Statistics of state and actions that replace the checkpoint's: those of a data set, or :data:`BAGS`
            for those of all usable control ticks of these bags.
        notify: Called with a sentence for each thing the user should know.

    Raises:
        ClpError: A bag, the embodiment and the policy do not fit each other.
    """
    if samples < 1:
        raise ClpError(f"the number is {samples}", where="samples", hint="calibrate on at least one frame")
    if not bags:
        raise ClpError("no bag is given", where="bags", hint="give one or more bags")
    check_seed(seed)
    prepare(policy, embodiment, statistics, notify)
    readers = [open_bag(bag) for bag in bags]
    steps = [Steps(embodiment.period_ns) for _ in readers] if statistics == BAGS else None
    episodes = _scan(readers, embodiment, scanned, steps)
    if steps is not None:
        normalise_by_steps(policy, embodiment, steps)
    drawn = draw_calibration_set([len(episode.usable) for episode in episodes], samples, seed)
    total = sum(len(indices) for indices in drawn)
    tasks = [task] * len(readers) if isinstance(task, str) else list(task)
    calibrator = Calibrator(policy, "; ".join(dict.fromkeys(tasks)), seed, total)
    number, share = processes.rank(), processes.world_size()
    mine = len(range(number, total, share))
    if progress is not None:
        progress(0, mine)
    taken, left_out, index = [], LeftOut(total), 0
    for reader, episode, indices, own in zip(readers, episodes, drawn, tasks, strict=True):
        before, already = calibrator.samples, Counter(left_out.dropped)
        numbers = {tick: index + i for i, tick in enumerate(episode.usable[indices].tolist())}
        index += len(numbers)
        ticks = [tick for tick, i in numbers.items() if i % share == number]
        for frame in read_frames(reader, embodiment, ticks, policy.chunk_size, left_out) if ticks else ():
            processes.check_others()
            calibrator.add(frame, numbers[frame.observation.tick_ns], own)
            if progress is not None:
                progress(calibrator.samples, mine)
        taken.append((calibrator.samples - before, left_out.dropped - already))
    processes.agree()
    calibrator.all_reduce()
    taken = _sum_taken(processes.gather(taken), total)
    described = [_describe(reader, episode, *t) for reader, episode, t in zip(readers, episodes, taken, strict=True)]
    return calibrator.finish(
        {
            "embodiment": embodiment.name,
            "actions": embodiment.actions.source,
            "episodes": len(readers),
            "bags": described,
        }
    )


def _sum_taken(taken: Sequence[Sequence[tuple[int, Counter[str]]]], total: int) -> list[tuple[int, Counter[str]]]:
    """Sums the frames used and left out of each bag over all processes. Too many left out are an error, as in one
    process."""
    whole = LeftOut(total)
    sums = []
    for bags in zip(*taken, strict=True):
        left_out = sum((counts for _, counts in bags), Counter[str]())
        for reason in left_out.elements():
            topic, _, what = reason.partition(": ")
            whole.add(ClpError(what, where=topic, hint="record it again"))
        sums.append((sum(samples for samples, _ in bags), left_out))
    return sums


def _scan(
    readers: Sequence[BagReader],
    embodiment: Embodiment,
    scanned: Callable[[int, int], None] | None,
    steps: Sequence[Steps] | None,
) -> list[EpisodeTicks]:
    total = sum(reader.end_ns - reader.start_ns for reader in readers)
    episodes, earlier = [], 0
    for number, reader in enumerate(readers):

        def advance(tick: int, reader: BagReader = reader, earlier: int = earlier) -> None:
            if scanned is not None:
                # The last tick lies after the last message.
                scanned((earlier + min(tick, reader.end_ns) - reader.start_ns) // 10**9, total // 10**9)

        episodes.append(usable_ticks(reader, embodiment, advance, steps[number] if steps else None))
        earlier += reader.end_ns - reader.start_ns
    return episodes


def given_statistics(text: str | None) -> Statistics | str | None:
    """Interprets ``--statistics`` and the node's parameter: :data:`BAGS`, a data set's folder, or none.

    Raises:
        ClpError: The folder has no statistics.
    """
    if not text:
        return None
    return BAGS if text == BAGS else read_dataset_statistics(text)


def prepare(
    policy: Policy,
    embodiment: Embodiment,
    statistics: Statistics | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> None:
    """Sets the statistics and the cameras of a policy for its calibration.

    Args:
        policy: The policy.
        embodiment: The robot of the demonstrations.
        statistics: As in :func:`calibrate_bags`. Those of the episodes are set later, by :func:`normalise_by_steps`.
        notify: Called with a sentence for each thing the user should know.

    Raises:
        ClpError: The robot, the statistics and the policy do not fit each other: see
            :meth:`Policy.check_features`.
    """
    features = [camera.feature for camera in embodiment.cameras.values()]
    whose, notes = f"embodiment {embodiment.name}", []
    if statistics is not None and policy.has_statistics:
        notes.append("the checkpoint's own statistics are not used, but those given")
    if isinstance(statistics, Statistics):
        for feature in statistics.values:
            if statistics.size(feature) != embodiment.action_size:
                raise ClpError(
                    f"the statistics of {feature} have {statistics.size(feature)} components; "
                    f"{whose} has {embodiment.action_size} joints",
                    where=statistics.source["path"],
                    hint="give a data set of this robot, or `bags` for the statistics of the calibration bags",
                )
        policy.normalise_by(statistics)
    if statistics == BAGS:
        notes += policy.check_cameras(features, whose)
    else:
        notes += policy.check_features(features, embodiment.action_size, whose)
    if statistics is None and policy.raw_features:
        from clp_ros.policies.base import raw_values

        missing = raw_values(policy.raw_features)
        notes.append(f"{missing} (hint: give the statistics of a data set, or of the bags: --statistics bags)")
    if notify is not None:
        for note in notes:
            notify(note)


def normalise_by_steps(policy: Policy, embodiment: Embodiment, steps: Sequence[Steps]) -> None:
    """Normalises a policy's state and actions by the statistics of episodes.

    Raises:
        ClpError: The policy uses no statistics, or has fewer components than the robot has joints.
    """
    policy.normalise_by(compute_statistics([one.states for one in steps], [one.actions for one in steps]))
    features = [camera.feature for camera in embodiment.cameras.values()]
    policy.check_features(features, embodiment.action_size, f"embodiment {embodiment.name}")


def draw_calibration_set(ticks: Sequence[int], samples: int, seed: int) -> list[np.ndarray]:
    """Draws frames over all episodes; all usable ticks have the same probability.

    Args:
        ticks: Number of usable control ticks of each episode.
        samples: Number of frames to draw; if there are fewer ticks, all are drawn.
        seed: Seed.

    Returns:
        Ascending indices into each episode's ticks, int64.
    """
    ends = np.cumsum(ticks)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(ends[-1], size=min(samples, int(ends[-1])), replace=False))
    starts = ends - np.asarray(ticks)
    return [
        chosen[(chosen >= start) & (chosen < end)] - start
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _describe(reader: BagReader, episode: EpisodeTicks, samples: int, left_out: Counter[str]) -> dict[str, Any]:
    return {
        "path": str(reader.path),
        "fingerprint": reader.fingerprint(),
        "start_ns": reader.start_ns,
        "end_ns": reader.end_ns,
        "topics": {topic.name: {"type": topic.type, "count": topic.count} for topic in reader.topics.values()},
        "usable_ticks": len(episode.usable),
        "samples": samples,
        "unusable_ticks": episode.unusable,
        "dropped_messages": dict(episode.dropped),
        "left_out_frames": dict(left_out),
    }
