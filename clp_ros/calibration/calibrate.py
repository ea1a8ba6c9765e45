# SPDX-License-Identifier: Apache-2.0
"""Calibration: frames of demonstrations through the policy once, and how alike its layers' hidden states are.

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

# Stands for the statistics of the calibration episodes themselves.
BAGS = "bags"

# Tokens of a module that all pairs of layers are compared by: the work and the memory grow with it, the frames' do not.
MATRIX_TOKENS = 2048


def check_seed(seed: int) -> None:
    """Refuses a negative seed, which numpy cannot take."""
    if seed < 0:
        raise ClpError(f"the seed is {seed}", where="seed", hint="use 0 or a positive number")


class Calibrator:
    """Runs frames through a policy and keeps running sums over its layers' hidden states; no state piles up.

    Neighbours are compared over all tokens. All pairs of layers are compared over at most :data:`MATRIX_TOKENS` tokens
    of a module, drawn evenly from the frames: over all tokens they would cost half as much as the policy itself.

    Args:
        policy: The policy.
        task: The instruction.
        seed: Each frame's noise and time, and its part of the tokens that all pairs are compared by.
        frames: Number of frames that will come, at most.

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
            # For states in half precision only; all others are multiplied and summed in float64.
            self._adjacent[module.name] = LinearCKA(module.layers, pairs="adjacent", products="float32", **given)
            self._all[module.name] = LinearCKA(module.layers, **given)
            self._distances[module.name] = AdjacentDistances(module.layers, **given)

    def add(self, frame: Frame, index: int | None = None) -> None:
        """Takes one frame: one forward pass of the training-time graph, at noise and time seeded for this frame.

        Args:
            frame: The frame.
            index: Its number among all frames drawn, which seeds it; that of frames taken so far if not given.

        Raises:
            ClpError: A hidden state is not finite; it names the layer.
        """
        index = self.samples if index is None else index
        observation = frame.observation
        batch = self.policy.batch(observation.images, observation.state, self.task, frame.actions, frame.action_is_pad)
        self.add_states(self.policy.hidden_states(batch, np.random.default_rng([self.seed, index])), index)

    def add_states(self, states: dict[str, HiddenStates], index: int) -> None:
        """Takes the hidden states of one frame, as :meth:`Policy.hidden_states` gives them, and empties them."""
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
        """The tokens of a frame that all pairs of layers are compared by; None for all of them.

        It depends on nothing but the frame, so that it is the same whichever process takes it.
        """
        share = (index + 1) * MATRIX_TOKENS // self.frames - index * MATRIX_TOKENS // self.frames
        if tokens <= share:
            return None
        return np.sort(np.random.default_rng([self.seed, index, module]).choice(tokens, share, replace=False))

    def all_reduce(self) -> None:
        """Adds up what all processes have taken, in every process."""
        if processes.world_size() == 1:
            return
        for sums in (self._adjacent, self._all, self._distances):
            for one in sums.values():
                one.all_reduce()
        taken = processes.gather((self.samples, self.tokens))
        self.samples = sum(samples for samples, _ in taken)
        self.tokens = {name: sum(tokens[name] for _, tokens in taken) for name in self.tokens}

    def finish(self, source: dict[str, Any]) -> Calibration:
        """The calibration of all frames taken.

        Args:
            source: Where the frames came from, for calibration.json: ``bags``, ``embodiment``, ``episodes``, …

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
    """Names the first layer at fault: where modules attend to each other, all those after it are at fault too."""
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
    task: str,
    samples: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    scanned: Callable[[int, int], None] | None = None,
    *,
    statistics: Statistics | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Calibration:
    """Calibrates on frames drawn over all episodes of some bags (one bag, one episode).

    In a :func:`clp_ros.core.processes.process_group` each process takes a part of the frames, and all return the
    calibration on all of them.

    Args:
        policy: The policy; its features must fit the embodiment.
        bags: rosbag2 recordings.
        embodiment: The robot they were recorded with.
        task: The instruction.
        samples: Number of frames; fewer where the bags have fewer usable control ticks.
        seed: Draws the frames, and each frame's noise and time.
        progress: Called with (frames done, frames drawn), of this process: done is 0 when all bags are scanned, then
            after each.
        scanned: Called with (seconds scanned, seconds of all bags) while the bags are searched for usable control
            ticks, which comes first.
        statistics: What state and actions are normalised by instead of the checkpoint's own statistics, if it has any:
            a data set's, or :data:`BAGS` for those of all usable control ticks of these bags.
        notify: Called with a sentence for each thing the user should know.

    Raises:
        ClpError: A bag, the embodiment or the policy do not fit each other; it says where.
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
    calibrator = Calibrator(policy, task, seed, total)
    number, share = processes.rank(), processes.world_size()
    mine = len(range(number, total, share))
    if progress is not None:
        progress(0, mine)
    taken, left_out, index = [], LeftOut(total), 0
    for reader, episode, indices in zip(readers, episodes, drawn, strict=True):
        before, already = calibrator.samples, Counter(left_out.dropped)
        numbers = {tick: index + i for i, tick in enumerate(episode.usable[indices].tolist())}
        index += len(numbers)
        ticks = [tick for tick, i in numbers.items() if i % share == number]
        for frame in read_frames(reader, embodiment, ticks, policy.chunk_size, left_out) if ticks else ():
            processes.check_others()
            calibrator.add(frame, numbers[frame.observation.tick_ns])
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
    """Frames taken and left out, a bag, of all processes together; too many left out are an error as in one process."""
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

        def tell(tick: int, reader: BagReader = reader, earlier: int = earlier) -> None:
            if scanned is not None:
                # The last tick lies after the last message.
                scanned((earlier + min(tick, reader.end_ns) - reader.start_ns) // 10**9, total // 10**9)

        episodes.append(usable_ticks(reader, embodiment, tell, steps[number] if steps else None))
        earlier += reader.end_ns - reader.start_ns
    return episodes


def given_statistics(text: str | None) -> Statistics | str | None:
    """What ``--statistics`` and the node's parameter stand for: :data:`BAGS`, a data set's folder, or nothing.

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
    """Gives a policy the statistics and the cameras that it is calibrated with.

    Args:
        policy: The policy.
        embodiment: The robot whose demonstrations it is calibrated on.
        statistics: As :func:`calibrate_bags` takes them. Those of the episodes come later, with
            :func:`normalise_by_steps`.
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
        ClpError: The policy takes none, or fewer components than the robot has joints.
    """
    policy.normalise_by(compute_statistics([one.states for one in steps], [one.actions for one in steps]))
    features = [camera.feature for camera in embodiment.cameras.values()]
    policy.check_features(features, embodiment.action_size, f"embodiment {embodiment.name}")


def draw_calibration_set(ticks: Sequence[int], samples: int, seed: int) -> list[np.ndarray]:
    """Draws frames over all episodes, each usable tick as likely as any other.

    Args:
        ticks: Number of usable control ticks of each episode.
        samples: Number of frames to draw; all there are, where there are fewer.
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
