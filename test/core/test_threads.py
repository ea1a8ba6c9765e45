# SPDX-License-Identifier: Apache-2.0
"""How many threads torch computes with."""

import os
import threading

import pytest
import torch

from clp_ros.core.errors import ClpError
from clp_ros.core.threads import set_threads, using_threads


def threads_elsewhere() -> int:
    """As a thread that is started now sees it: the policy node's worker."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_a_number_holds_until_it_is_torchs_own_again() -> None:
    before = torch.get_num_threads()
    set_threads(0)
    assert torch.get_num_threads() == before
    for number in (3, 2):
        assert set_threads(number) == number
        assert torch.get_num_threads() == threads_elsewhere() == number
    set_threads(0)
    assert torch.get_num_threads() == threads_elsewhere() == before
    with pytest.raises(ClpError, match="threads: the number is -1"):
        set_threads(-1)


@pytest.mark.parametrize("variable", [None, "5"])
def test_a_commands_number_holds_in_its_processes_too(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(3):
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
        raise KeyError
    with using_threads(0):
        assert os.environ.get("OMP_NUM_THREADS") == variable
    assert (torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")) == (before, variable)
