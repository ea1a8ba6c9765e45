# SPDX-License-Identifier: Apache-2.0
"""When a policy is said to wait for the processor."""

import pytest

from clp_ros.control.processor_share import IN_A_ROW, RATIO, ProcessorShare


class Clocks:
    """Two clocks that the test moves."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = 100.0, 7.0
        self.notified: list[str] = []
        self.share = ProcessorShare(self.notified.append, lambda: self.wall_s, lambda: self.cpu_s)

    def chunk(self, wall_s: float, cpu_s: float) -> None:
        with self.share.measured():
            self.wall_s += wall_s
            self.cpu_s += cpu_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_the_user_is_notified_once(clocks: Clocks) -> None:
    for _ in range(IN_A_ROW - 1):
        clocks.chunk(2.1, 0.7)
    assert clocks.notified == []
    clocks.chunk(2.1, 0.7)
    (reported,) = clocks.notified
    assert "took 2.10 s, its thread ran for 0.70 s" in reported
    assert "threads" in reported
    for _ in range(3 * IN_A_ROW):
        clocks.chunk(1, 1)
        clocks.chunk(2.1, 0.7)
    assert len(clocks.notified) == 1


def test_a_policy_that_gets_the_processor_causes_no_notification(clocks: Clocks) -> None:
    for _ in range(10):
        clocks.chunk(1, 1)
        clocks.chunk(1, 1.01 / RATIO)
        clocks.chunk(0.001, 0)  # too short to judge
    assert clocks.notified == []


def test_only_a_lasting_wait_is_notified(clocks: Clocks) -> None:
    for _ in range(10):
        clocks.chunk(3, 0.1)
        clocks.chunk(1, 1)
    assert clocks.notified == []


def test_a_chunk_that_fails_does_not_count(clocks: Clocks) -> None:
    for _ in range(10):
        with pytest.raises(RuntimeError), clocks.share.measured():
            clocks.wall_s += 5
            raise RuntimeError
    assert clocks.notified == []
