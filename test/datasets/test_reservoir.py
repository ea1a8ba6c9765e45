# SPDX-License-Identifier: Apache-2.0
"""A bag played into the reservoir gives what reading the bag gives; the draw is uniform and bounded."""

from types import SimpleNamespace

import numpy as np
import pytest

from clp_ros.bags.reader import open_bag
from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.datasets.episodes import Steps, read_frames, usable_ticks
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.robots.embodiment import Embodiment, load_embodiment

CHUNK = 10
RATE_HZ = 50
STEP_NS = 10**9 // RATE_HZ


@pytest.fixture
def arm() -> Embodiment:
    """One camera and one joint, sampled by receive stamp."""
    sync = {"policy": "drop", "stamp": "receive"}
    return Embodiment.model_validate(
        {
            "name": "arm",
            "description": "one joint",
            "control_rate_hz": RATE_HZ,
            "cameras": {
                "eye": {
                    "topic": "/eye",
                    "type": "sensor_msgs/msg/Image",
                    "feature": "observation.images.eye",
                    "sync": sync,
                }
            },
            "joint_states": {"arm": {"topic": "/states", "sync": sync}},
            "controllers": {
                "arm": {
                    "joint_states": "arm",
                    "topic": "/arm/joint_trajectory",
                    "joints": [{"name": "waist", "lower": -1e6, "upper": 1e6, "velocity": 1, "unit": "rad"}],
                }
            },
        }
    )


def states(position: float) -> SimpleNamespace:
    return SimpleNamespace(name=["waist"], position=[position])


def picture(value: int) -> SimpleNamespace:
    pixels = np.full(3, value % 256, np.uint8)
    return SimpleNamespace(encoding="rgb8", height=1, width=1, step=3, is_bigendian=0, data=pixels)


def feed(reservoir: FrameReservoir, steps: range, start_ns: int = 10**9) -> None:
    """A state and a picture a step, both numbered by it, a millisecond before each control tick but the first."""
    for step in steps:
        stamp = start_ns + step * STEP_NS
        reservoir.add("/states", states(step), stamp)
        reservoir.add("/eye", picture(step), stamp)


@pytest.mark.parametrize("ticks", ["all", "some"])
def test_a_bag_gives_the_frames_that_reading_it_gives(ticks: str) -> None:
    embodiment = load_embodiment("aloha_bimanual")
    reader = open_bag(resource_path("rosbags/aloha_bimanual"))
    steps = Steps(embodiment.period_ns)
    usable = usable_ticks(reader, embodiment, steps=steps).usable
    reservoir = FrameReservoir(embodiment, len(usable) if ticks == "all" else 7, CHUNK, seed=3, keep_states=True)
    for message in reader.messages(list(embodiment.topics)):
        reservoir.add(message.topic, message.data, message.receive_ns)
    drawn = list(reservoir.frames())
    assert reservoir.usable == len(usable)
    assert reservoir.episodes == 1
    wanted = [frame.observation.tick_ns for frame in drawn]
    assert reservoir.steps.ticks == steps.ticks == usable.tolist()
    np.testing.assert_array_equal(reservoir.steps.states, steps.states)
    assert wanted == sorted(set(wanted))
    assert wanted == usable.tolist() if ticks == "all" else len(wanted) == 7
    for got, expected in zip(drawn, read_frames(reader, embodiment, wanted, CHUNK), strict=True):
        assert np.array_equal(got.actions, expected.actions)
        assert np.array_equal(got.action_is_pad, expected.action_is_pad)
        assert np.array_equal(got.observation.state, expected.observation.state)
        assert got.observation.stamps == expected.observation.stamps
        for key, pixels in expected.observation.images.items():
            assert np.array_equal(got.observation.images[key], pixels)


def test_every_tick_is_as_likely_as_any_other(arm: Embodiment) -> None:
    steps, samples, runs = 40, 4, 1500
    counts = np.zeros(steps)
    for seed in range(runs):
        reservoir = FrameReservoir(arm, samples, 1, seed)
        feed(reservoir, range(steps))
        reservoir.end_episode()
        for drawn in reservoir._drawn:
            counts[(drawn.sample.time_ns - 10**9) // STEP_NS] += 1
    assert counts.sum() == samples * runs
    expected = samples * runs / steps
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 72.1  # 39 degrees of freedom: exceeded once in a thousand by chance; the seeds are fixed


def test_no_more_than_the_samples_are_held(arm: Embodiment) -> None:
    reservoir = FrameReservoir(arm, 3, 1000)
    for step in range(200):
        feed(reservoir, range(step, step + 1))
        assert reservoir.held == min(reservoir.usable, 3)
        assert len(reservoir._open) <= 3
    assert len(list(reservoir.frames())) == 3


def test_the_same_seed_draws_the_same(arm: Embodiment) -> None:
    ticks = []
    for seed in (5, 5, 6):
        reservoir = FrameReservoir(arm, 5, 2, seed)
        feed(reservoir, range(100))
        ticks.append([frame.observation.tick_ns for frame in reservoir.frames()])
    assert ticks[0] == ticks[1] != ticks[2]


@pytest.mark.parametrize("jump_s", [-5, -1.5, 2, 3600])
def test_a_jump_of_the_clock_begins_an_episode_and_no_action_crosses_it(arm: Embodiment, jump_s: float) -> None:
    reservoir = FrameReservoir(arm, 100, 5)
    feed(reservoir, range(20), 10**10)
    feed(reservoir, range(1000, 1020), 10**10 + 20 * STEP_NS + round(jump_s * 1e9) - 1000 * STEP_NS)
    frames = list(reservoir.frames())
    assert reservoir.episodes == 2
    assert len(frames) == reservoir.usable == 40
    for frame in frames:
        known = frame.actions[~frame.action_is_pad, 0]
        first = frame.observation.state[0]
        assert np.array_equal(known, first + 1 + np.arange(len(known)))
        assert (known >= 1000).all() if first >= 1000 else (known < 20).all()


def test_what_is_missing_is_named(arm: Embodiment) -> None:
    reservoir = FrameReservoir(arm, 4, 2)
    with pytest.raises(ClpError, match="/eye: no message came"):
        next(reservoir.frames())
    reservoir = FrameReservoir(arm, 4, 2)
    for step in range(10):
        reservoir.add("/states", states(step), 10**9 + step * STEP_NS)
    reservoir.add("/eye", picture(0), 10**9 + 10 * STEP_NS)
    for step in range(11, 14):
        reservoir.add("/eye", picture(0), 10**9 + step * STEP_NS)
    assert reservoir.usable == 0
    with pytest.raises(ClpError, match=r"^/(eye|states): no control tick has all inputs: "):
        next(reservoir.frames())
    with pytest.raises(ClpError, match="samples: the number is 0"):
        FrameReservoir(arm, 0, 2)
